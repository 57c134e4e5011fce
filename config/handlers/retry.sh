#!/bin/sh
# A handler in sh. It fetches the page whose address is the payload, like "https://example.org/".
# A job whose site is busy is retried in five minutes. A job without an http address is dead.
url=$(cat) || exit
url=${url#\"} url=${url%\"}

case $url in
    http://* | https://*) ;;
    *)
        # Set kill_exit_codes = [100] in the configuration. Otherwise the job is retried.
        echo "not an address: $url" >&2
        exit 100
        ;;
esac

# --max-time limits the wait for the site. The timeout in the configuration limits the whole job.
curl --fail --silent --show-error --max-time 20 --output /dev/null -- "$url" && exit 0

echo '{"error_type": "SiteBusy", "retry_in": "5m"}' > "$ZIZQ_RESULT_FILE"
exit 1
