//! Who may ask, and how.
//!
//! A browser on the node, or at the near end of a forwarded port, may show pages
//! of others too. Such a page can have a name of its own lead to this address (DNS
//! rebinding): so the request must name this address. And it can send requests
//! here without reading the answers: so the browser must not say that another page
//! sends them.

use std::net::{IpAddr, SocketAddr};

use hyper::{Method, StatusCode, header::HOST};

use super::{API, Refusal};
use crate::health::http::Asked;

/// By which browsers say whose page asks (Fetch Metadata).
const SITE: &str = "sec-fetch-site";

/// # Errors
///
/// Why a request is not answered.
pub(super) fn admit(asked: &Asked, bound: SocketAddr) -> Result<(), Refusal> {
    if !matches!(*asked.method(), Method::GET | Method::HEAD) {
        let sentence = "nothing can be changed here: ask with GET";
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, sentence));
    }
    let forbidden = |sentence| Err(Refusal::new(StatusCode::FORBIDDEN, sentence));
    if !is_own(asked.at, bound) {
        return forbidden(
            "the dashboard is for the node itself: forward a port, and ask localhost",
        );
    }
    if !names_this(asked, bound) {
        return forbidden("the Host of the request is no address of this dashboard: ask localhost");
    }
    let site = asked.headers().get(SITE);
    let is_of_others = site.is_some_and(|site| site != "same-origin" && site != "none");
    if is_of_others && asked.path().starts_with(API) {
        return forbidden("another page asks this of the browser, and it is not told");
    }
    Ok(())
}

/// One that the dashboard is at: loopback, and the address that it was told, if
/// that is a single one.
fn is_own(addr: IpAddr, bound: SocketAddr) -> bool {
    let bound = bound.ip().to_canonical();
    addr.is_loopback() || (!bound.is_unspecified() && addr == bound)
}

/// All that names a host must name this one.
fn names_this(asked: &Asked, bound: SocketAddr) -> bool {
    let fields = asked.headers().get_all(HOST).iter();
    let fields = fields.map(|field| field.to_str().unwrap_or_default());
    let mut hosts = asked.host().into_iter().chain(fields).peekable();
    hosts.peek().is_some() && hosts.all(|host| is_name_of(host, bound))
}

/// Whether a `Host` is one of the dashboard's; whatever the port, for that may be
/// a forwarded one.
fn is_name_of(host: &str, bound: SocketAddr) -> bool {
    let name = without_port(host);
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let addr = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let addr: Option<IpAddr> = addr.unwrap_or(name).parse().ok();
    addr.is_some_and(|addr| is_own(addr.to_canonical(), bound))
}

/// The colons of an address in brackets separate no port.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    const LOOPBACK: &str = "127.0.0.1:10249";
    const EVERYWHERE: &str = "0.0.0.0:10249";
    const ONE: &str = "192.0.2.1:10249";

    struct Case {
        method: &'static str,
        uri: &'static str,
        at: &'static str,
        headers: &'static [(&'static str, &'static str)],
    }

    const USUAL: Case = Case {
        method: "GET",
        uri: "/api/status",
        at: "127.0.0.1",
        headers: &[("host", "localhost:10249")],
    };

    fn status(case: &Case, bound: &str) -> u16 {
        let mut request = Request::builder().method(case.method).uri(case.uri);
        for (name, value) in case.headers {
            request = request.header(*name, *value);
        }
        let (head, ()) = request.body(()).expect("a request").into_parts();
        let asked = Asked::new(head, case.at.parse().expect("an address"));
        let bound = bound.parse().expect("an address");
        admit(&asked, bound).map_or_else(|refusal| refusal.status.as_u16(), |()| 200)
    }

    #[test]
    fn nothing_but_questions_is_taken() {
        for (method, wanted) in [
            ("GET", 200),
            ("HEAD", 200),
            ("POST", 405),
            ("PUT", 405),
            ("DELETE", 405),
            ("OPTIONS", 405),
            ("BREW", 405),
        ] {
            assert_eq!(
                status(&Case { method, ..USUAL }, LOOPBACK),
                wanted,
                "{method}"
            );
        }
    }

    #[test]
    fn a_host_must_be_this_one() {
        for (host, loopback, one) in [
            ("localhost", 200, 200),
            ("LOCALHOST:8080", 200, 200),
            ("localhost.:8080", 200, 200),
            ("127.0.0.1:10249", 200, 200),
            ("127.8.9.1", 200, 200),
            ("[::1]:10249", 200, 200),
            ("[::1]", 200, 200),
            ("[::ffff:127.0.0.1]:80", 200, 200),
            ("192.0.2.1:10249", 403, 200),
            ("192.0.2.2:10249", 403, 403),
            ("evil.example:10249", 403, 403),
            ("localhost.evil.example", 403, 403),
            ("127.0.0.1.evil.example:10249", 403, 403),
            ("localhost:80@evil.example", 403, 403),
            ("", 403, 403),
            (":10249", 403, 403),
        ] {
            let headers = &*vec![("host", host)].leak();
            let case = Case { headers, ..USUAL };
            assert_eq!(status(&case, LOOPBACK), loopback, "{host:?}");
            assert_eq!(status(&case, ONE), one, "{host:?}");
        }
    }

    #[test]
    fn every_host_that_is_named_counts() {
        let none = Case {
            headers: &[],
            ..USUAL
        };
        assert_eq!(status(&none, LOOPBACK), 403);
        let two = &[("host", "localhost"), ("host", "evil.example")];
        let two = Case {
            headers: two,
            ..USUAL
        };
        assert_eq!(status(&two, LOOPBACK), 403);
        let whole = Case {
            uri: "http://evil.example/api/status",
            ..USUAL
        };
        assert_eq!(status(&whole, LOOPBACK), 403);
    }

    #[test]
    fn other_hosts_reach_it_where_it_was_told_to_be_only() {
        for (at, bound, wanted) in [
            ("127.0.0.1", EVERYWHERE, 200),
            ("::ffff:127.0.0.1", "[::]:10249", 200),
            ("::1", "[::]:10249", 200),
            ("192.0.2.1", EVERYWHERE, 403),
            ("2001:db8::1", "[::]:10249", 403),
            ("192.0.2.1", ONE, 200),
        ] {
            let case = Case { at, ..USUAL };
            assert_eq!(status(&case, bound), wanted, "{at} {bound}");
        }
    }

    #[test]
    fn pages_of_others_can_lead_here_and_not_ask() {
        for (site, page, data) in [
            ("same-origin", 200, 200),
            ("none", 200, 200),
            ("same-site", 200, 403),
            ("cross-site", 200, 403),
        ] {
            let headers = &*vec![("host", "localhost"), (SITE, site)].leak();
            let case = Case { headers, ..USUAL };
            assert_eq!(status(&case, LOOPBACK), data, "{site}");
            let case = Case { uri: "/", ..case };
            assert_eq!(status(&case, LOOPBACK), page, "{site}");
        }
    }
}
