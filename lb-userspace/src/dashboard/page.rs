//! The page itself: one file, without anything from elsewhere.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::{
    StatusCode,
    header::{
        ALLOW, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY,
        X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
};
use ring::digest::{SHA256, digest};

use crate::health::http::Answer;

const PAGE: &str = include_str!("page.html");

/// Keeps what is told from other pages of the same browser.
const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// For all that is no page.
const NOTHING: &str = "default-src 'none'; frame-ancestors 'none'";

/// The page, and what a browser may do for it.
#[derive(Debug)]
pub(super) struct Page {
    policy: HeaderValue,
}

impl Page {
    pub(super) fn new() -> Self {
        let policy = HeaderValue::from_str(&policy());
        Self {
            policy: policy.unwrap_or(HeaderValue::from_static(NOTHING)),
        }
    }

    pub(super) fn answer(&self) -> Answer {
        Answer::new(StatusCode::OK, "text/html; charset=utf-8", PAGE)
            .with(CONTENT_SECURITY_POLICY, self.policy.clone())
    }
}

/// What a browser may do: run this script and show it so, ask here, and nothing
/// else, whatever somebody manages to write into the page.
fn policy() -> String {
    let (script, style) = (hash("script"), hash("style"));
    format!(
        "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

/// By which the policy knows the one element of a name.
fn hash(element: &str) -> String {
    let (begin, end) = (format!("<{element}>"), format!("</{element}>"));
    let text = PAGE.split_once(&begin).map_or("", |(_, rest)| rest);
    let text = text.split_once(&end).map_or("", |(text, _)| text);
    format!(
        "sha256-{}",
        STANDARD.encode(digest(&SHA256, text.as_bytes()))
    )
}

/// An answer with what goes for all of them.
pub(super) fn sealed(mut answer: Answer) -> Answer {
    let has = |answer: &Answer, name| answer.headers.iter().any(|(known, _)| known == name);
    if !has(&answer, CONTENT_SECURITY_POLICY) {
        answer = answer.with(CONTENT_SECURITY_POLICY, HeaderValue::from_static(NOTHING));
    }
    if answer.status == StatusCode::METHOD_NOT_ALLOWED {
        answer = answer.with(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    let same_origin = HeaderValue::from_static("same-origin");
    answer
        .with(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))
        .with(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"))
        .with(REFERRER_POLICY, HeaderValue::from_static("no-referrer"))
        .with(RESOURCE_POLICY, same_origin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_one_script_and_one_style_and_nothing_from_elsewhere() {
        for element in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{element}")).count(), 1, "{element}");
            assert_eq!(
                PAGE.matches(&format!("<{element}>")).count(),
                1,
                "{element}"
            );
            assert_eq!(
                PAGE.matches(&format!("</{element}>")).count(),
                1,
                "{element}"
            );
        }
        // The one is the name of what SVG is, and leads nowhere.
        let elsewhere = PAGE.replace("http://www.w3.org/2000/svg", "");
        for foreign in ["://", " src=", "@import", "url("] {
            assert!(!elsewhere.contains(foreign), "{foreign}");
        }
    }

    /// Names of Services are text, and never anything else.
    #[test]
    fn the_page_makes_no_elements_of_text() {
        for way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "DOMParser",
            " style=",
            " onclick=",
        ] {
            assert!(!PAGE.contains(way), "{way}");
        }
    }

    #[test]
    fn the_policy_knows_the_script_and_the_style() {
        let policy = policy();
        let empty = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";
        assert!(!policy.contains(empty), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(policy.matches("sha256-").count(), 2, "{policy}");
        let value = Page::new().policy;
        assert_eq!(value, *policy, "a value for a header");
    }
}
