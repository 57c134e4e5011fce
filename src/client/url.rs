//! [`ServerUrl`]: the address of the server. [`WorkerId`]: the name of this worker in the server's log.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use hyper::header::HeaderValue;

/// The default address of a Zizq server.
pub const DEFAULT_URL: &str = "http://localhost:7890";

/// The address of the server: `http` or `https`, a host, and optionally a port and a path prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUrl(Uri);

impl Default for ServerUrl {
    fn default() -> Self {
        Self(Uri::from_static(DEFAULT_URL))
    }
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || {
            let public = without_secrets(text);
            let hint = if public == text { "" } else { ", without a user, a password or a query" };
            format!("url must be http://HOST[:PORT][/PREFIX] or https://…{hint} (got {public:?})")
        };
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| wanted())?;
        let authority = uri.authority().ok_or_else(wanted)?;
        let fits = matches!(uri.scheme_str(), Some("http" | "https"))
            && !authority.host().is_empty()
            && !authority.as_str().contains('@')
            && uri.query().is_none()
            && !text.contains('#')
            // Refuse port 0: a client cannot connect to port 0, and an embedded server that binds it listens on an arbitrary port.
            && authority.port_u16() != Some(0)
            && (authority.port_u16().is_some() || authority.as_str() == authority.host());
        if fits { Ok(Self(uri)) } else { Err(wanted()) }
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

impl ServerUrl {
    pub(super) fn uri(&self) -> Uri {
        self.0.clone()
    }

    /// Returns the host name or address, without the brackets of an IPv6 address.
    pub fn host(&self) -> &str {
        self.0.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    /// Returns the port, or the default port of the scheme.
    pub fn port(&self) -> u16 {
        self.0.port_u16().unwrap_or(if self.is_https() { 443 } else { 80 })
    }

    /// Reports whether the connection is encrypted.
    pub fn is_https(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    /// Returns the path prefix, which precedes the API's own path in each request. May be empty.
    pub fn prefix(&self) -> &str {
        self.0.path().trim_end_matches('/')
    }
}

/// Returns a url without its secrets: the user, the password and the query.
pub(crate) fn without_secrets(url: &str) -> String {
    let url = hide_user(url);
    match url.split_once('?') {
        Some((public, _)) => format!("{public}?…"),
        None => url,
    }
}

/// Hides the user and password of a URL in `text`. Text without a URL is not changed.
pub(crate) fn without_user(text: &str) -> String {
    if text.contains("://") { hide_user(text) } else { text.to_owned() }
}

/// Replaces everything between the scheme and the last `@` with `…`, because a password may contain any character, even `@`.
fn hide_user(text: &str) -> String {
    let Some(end) = text.rfind('@') else { return text.to_owned() };
    let start = text.find("://").map(|colon| colon + "://".len()).filter(|start| *start <= end).unwrap_or(0);
    format!("{}…{}", &text[..start], &text[end..])
}

/// The name of a worker in the server's log, in printable ASCII because it is sent as a header. The default is `HOSTNAME-PID`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerId(HeaderValue);

impl FromStr for WorkerId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value = HeaderValue::from_str(text.trim()).ok().filter(|value| !value.is_empty() && value.to_str().is_ok());
        value.map(Self).ok_or_else(|| format!("worker_id must be printable ASCII, and not empty (got {text:?})"))
    }
}

impl WorkerId {
    pub(super) fn header(&self) -> &HeaderValue {
        &self.0
    }
}

impl Default for WorkerId {
    fn default() -> Self {
        let (host, pid) = (gethostname::gethostname(), std::process::id());
        format!("{}-{pid}", host.to_string_lossy()).parse().unwrap_or_else(|_| Self(HeaderValue::from(pid)))
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_that_cannot_work_are_refused() {
        for bad in [
            "",
            "localhost:7890",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://h?x=1",
            "http://h:99999",
            "http://h:0",
            "http://h#x",
            "/x",
        ] {
            let error = bad.parse::<ServerUrl>().unwrap_err();
            assert!(error.starts_with("url must be http://HOST"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_url_is_shown_without_its_user_password_and_query() {
        for (url, public) in [
            ("http://h:1/q", "http://h:1/q"),
            ("http://u:p@h/q", "http://…@h/q"),
            ("http://u:p@ss/w?rd@h", "http://…@h"),
            ("u:p@h", "…@h"),
            ("u@http://h", "…@http://h"),
            ("http://h/?key=a@b", "http://…@b"),
            ("http://h?key", "http://h?…"),
        ] {
            assert_eq!(without_secrets(url), public);
        }
        assert_eq!(without_user("got 'http://u:p@h'?"), "got 'http://…@h'?");
        assert_eq!(without_user("got ann@example.org"), "got ann@example.org");
    }

    #[test]
    fn a_url_knows_its_parts() {
        let url: ServerUrl = "https://[::1]/q".parse().unwrap();
        assert_eq!((url.host(), url.port(), url.prefix(), url.is_https()), ("::1", 443, "/q", true));
        assert_eq!("http://h:7890/".parse::<ServerUrl>().unwrap().to_string(), "http://h:7890");
    }
}
