//! The HTML status page, which `GET /` returns: markup, style and script in one response. The script fetches all displayed data
//! from `/status`.

/// Content security policy that allows only the page's script and style, `data:` images, and requests to this server.
pub(super) const POLICY: &str = concat!(
    "default-src 'none'; ",
    "script-src 'sha256-J5EKaEC2LgjiUWEM9KYA0QOHaHsnrH8uiOjNxJJHP88='; ",
    "style-src 'sha256-4t+pfaraPoZdUNdfZcG82NYhGBWr3DJliHcwdRtZlMk='; ",
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; ",
    "require-trusted-types-for 'script'; trusted-types 'none'"
);

/// Returns the status page as HTML.
pub(super) const fn text() -> &'static str {
    concat!(
        include_str!("page/head.html"),
        "<style>",
        include_str!("page/page.css"),
        "</style>\n<script type=\"module\">",
        include_str!("page/page.js"),
        "</script>\n",
        include_str!("page/body.html"),
    )
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use ring::digest::{SHA256, digest};

    use super::*;

    fn source(text: &str) -> String {
        format!("'sha256-{}'", BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes())))
    }

    /// Returns the content of the only element with the tag `name`.
    fn content(name: &str) -> &'static str {
        let (_, rest) = text().split_once(&format!("<{name}")).unwrap();
        let (inside, rest) = rest.split_once(&format!("</{name}>")).unwrap();
        assert!(!rest.contains(&format!("<{name}")), "{name}");
        inside.split_once('>').unwrap().1
    }

    #[test]
    fn the_policy_allows_this_script_and_this_style() {
        for name in ["script", "style"] {
            let directive = format!("{name}-src {};", source(content(name)));
            assert!(POLICY.contains(&directive), "in page.rs, write: {directive}");
        }
    }

    #[test]
    fn no_attribute_of_the_page_has_style_or_script_in_it() {
        let markup = [include_str!("page/head.html"), include_str!("page/body.html")].concat();
        for forbidden in [" style=", " on", "javascript:", "http://", "https://"] {
            let found = markup.lines().find(|line| line.contains(forbidden) && !line.contains("http://www.w3.org"));
            assert!(found.is_none_or(|line| forbidden == " on" && !line.contains("=\"")), "{forbidden}: {found:?}");
        }
        for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!content("script").contains(forbidden), "{forbidden}");
        }
    }
}
