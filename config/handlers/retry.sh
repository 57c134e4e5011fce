#!/bin/sh
# A handler in sh: fetches the page whose address is the payload, like "https://example.org/".
# When the site is busy, it asks to be tried again in five minutes. An address that is no address will never do.
url=$(cat) || exit
url=${url#\"} url=${url%\"}

case $url in
    http://* | https://*) ;;
    *)
        # With kill_exit_codes = [100] in the configuration, the job is dead at once.
        echo "not an address: $url" >&2
        exit 100
        ;;
esac

# --max-time: what waits for others needs a limit. The timeout of the configuration is the one for everything else.
curl --fail --silent --show-error --max-time 20 --output /dev/null -- "$url" && exit 0

echo '{"error_type": "SiteBusy", "retry_in": "5m"}' > "$ZIZQ_RESULT_FILE"
exit 1
