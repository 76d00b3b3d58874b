//! The dashboard in a browser, as somebody with a keyboard meets it.

use std::{collections::BTreeSet, fmt::Write as _};

use lb_tests::{
    agent::Hooks,
    browser::Browser,
    traffic::{Protocol, Request},
    world::World,
};
use serde_json::Value;

const PAGE: &str = "http://127.0.0.1:10249/";

/// More Services than the page shows at once.
const MANY: u8 = 220;

/// Rows of the list at most.
const SHOWN: u64 = 200;

/// A name that would do something if it were taken for more than text.
const HOSTILE: &str = "<img src=x onerror=document.title=1>";

fn service(name: &str, addr: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name:?}\n  namespace: shop\n\
         spec:\n  clusterIP: {addr}\n  clusterIPs: [{addr}]\n  ipFamilies: [IPv4]\n  \
         ports:\n  - port: 80\n---\n"
    )
}

/// A node with many Services, and a page of it.
fn open(world: &mut World) -> Browser {
    let mut services = service(HOSTILE, "10.96.1.250");
    for number in 0..MANY {
        let name = format!("service-{number:03}");
        write!(services, "{}", service(&name, &format!("10.96.1.{number}")))
            .expect("a string grows");
    }
    world.agent.manifests.put("many.yaml", &services);
    world.agent.start();
    let mut browser = Browser::open(&world.cluster.node.place.without_cgroup(), PAGE);
    browser.await_value("document.documentElement?.dataset.polls > 0");
    browser
}

fn text(browser: &mut Browser, id: &str) -> String {
    let text = browser.value(&format!("document.getElementById('{id}').innerText"));
    text.as_str().unwrap_or_default().to_owned()
}

/// Waits until an element has some text.
fn await_text(browser: &mut Browser, id: &str, part: &str) {
    browser.await_value(&format!(
        "document.getElementById('{id}').innerText.includes({part:?})"
    ));
}

/// The element that keys go to, in words.
const FOCUSED: &str = "(e => e.id || e.getAttribute('aria-label') || e.dataset.key || e.innerText)\
                       (document.activeElement)";

/// Presses Tab until the page has been gone through once; each stop must be seen.
fn stops(browser: &mut Browser) -> BTreeSet<String> {
    let mut stops = BTreeSet::new();
    for _ in 0..100 {
        browser.press("Tab");
        // Behind the last one is the browser's own frame.
        if browser.value("document.activeElement === document.body") == true {
            continue;
        }
        let stop = browser.value(FOCUSED).as_str().expect("words").to_owned();
        let outline = browser.value("getComputedStyle(document.activeElement).outlineStyle");
        assert_eq!(outline, "solid", "{stop}");
        if !stops.insert(stop) {
            break;
        }
    }
    stops
}

/// The least contrast between a text and what is behind it, of all elements that
/// have text of their own (WCAG 2, 1.4.3).
const LEAST_CONTRAST: &str = "(() => {
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = color => color.match(/[0-9.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  let least = 21;
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || ['SCRIPT', 'OPTION'].includes(e.tagName)) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()";

#[test]
fn a_node_is_looked_at_by_keyboard() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let mut browser = open(&mut world);
    let client = world.cluster.client.host.without_cgroup();
    let traffic = client.stream(&world.any_request(), false);

    assert_eq!(browser.value("document.title"), "klb on node-1");
    await_text(&mut browser, "state", "in sync");
    let rows = "document.querySelectorAll('#services tbody tr').length";
    assert_eq!(browser.value(rows), SHOWN);
    let more = u64::from(MANY) + 3 - SHOWN;
    await_text(&mut browser, "more", &format!("{more} more"));
    browser.picture("light");

    // Names are text.
    browser.press("/");
    assert_eq!(browser.value(FOCUSED), "filter");
    browser.enter("onerror");
    browser.await_value(&format!("{rows} === 1"));
    let name = browser.value("document.querySelector('#services tbody').innerText");
    assert!(name.to_string().contains(HOSTILE), "{name}");
    assert_eq!(browser.value("document.querySelector('img')"), Value::Null);

    browser.value("document.getElementById('filter').select()");
    browser.enter("echo");
    browser.await_value(&format!("{rows} === 2"));
    for (key, focused) in [
        ("ArrowDown", "default/echo:datagrams"),
        ("ArrowDown", "default/echo:http"),
        ("ArrowDown", "default/echo:http"),
        ("Home", "default/echo:datagrams"),
        ("ArrowUp", "filter"),
        ("ArrowDown", "default/echo:datagrams"),
        ("End", "default/echo:http"),
        ("Escape", "filter"),
        ("Enter", "default/echo:http"),
        ("Enter", "default/echo:http"),
    ] {
        browser.press(key);
        assert_eq!(browser.value(FOCUSED), focused, "after {key}");
    }
    await_text(&mut browser, "chosen-h", "default/echo:http");
    browser.await_value("document.querySelectorAll('#backends tr').length === 6");
    browser.await_value("document.querySelectorAll('#frontends tr').length === 6");
    await_text(&mut browser, "share-of", "opened while this was shown");
    browser.await_value(
        "[...document.querySelectorAll('#backends .bar i')].filter(i => i.offsetWidth > 5).length >= 2",
    );
    // What has the focus keeps it while rows are told anew.
    assert_eq!(browser.value(FOCUSED), "default/echo:http");
    browser.await_value("document.querySelector('#plot-new .curve').getAttribute('d')");

    let nobody = Request::new(Protocol::Tcp, "10.96.0.1:81".parse().expect("an address"));
    client.ask(&nobody).expect_err("refused");
    await_text(&mut browser, "drops", "no_such_port at tc-ingress");
    await_text(&mut browser, "drops", "has: answered with");
    browser.await_value("document.querySelector('#drops .curve').getAttribute('d')");

    let stops = stops(&mut browser);
    for wanted in [
        "filter",
        "Service",
        "Packets/s",
        "default/echo:http",
        "Explain a packet to 10.96.0.1:80",
        "from",
        "to",
        "proto",
        "at",
        "ask",
        "Devices, settings, kernel",
    ] {
        assert!(stops.contains(wanted), "{wanted} is not among {stops:?}");
    }

    explain(&mut browser);
    looks(&mut browser);

    traffic.stop();
    world.agent.kill();
    await_text(&mut browser, "gone", "The agent does not answer since");
    assert_eq!(text(&mut browser, "state"), "no answer");
    browser.picture("gone");
    world.agent.start();
    browser.await_value("document.getElementById('gone').hidden");
    await_text(&mut browser, "state", "in sync");

    assert_eq!(browser.complaints(), [""; 0]);
    let asked = browser.asked_for();
    assert!(asked.len() > 10);
    let mut foreign = asked.iter().filter(|address| !address.starts_with(PAGE));
    assert_eq!(foreign.find(|address| *address != "data:,"), None);
}

/// Asks by the form, from the button of a frontend on.
fn explain(browser: &mut Browser) {
    browser.value(
        "document.querySelector('[aria-label=\"Explain a packet to 192.168.50.1:30080\"]').focus()",
    );
    browser.press("Enter");
    assert_eq!(browser.value(FOCUSED), "from");
    assert_eq!(
        browser.value("document.getElementById('to').value"),
        "192.168.50.1:30080"
    );
    browser.enter("192.168.50.2");
    browser.press("Enter");
    browser.await_value("document.documentElement.dataset.explained === '1'");
    let answer = text(browser, "answer");
    for part in [
        "forwarded",
        "new_flow",
        "default/echo:http",
        "10.244.0.7:3000",
        "sees the client",
    ] {
        assert!(answer.to_lowercase().contains(part), "{part}: {answer}");
    }
    browser.picture("explained");
    browser.value("document.getElementById('from').select()");
    browser.enter("nobody");
    browser.press("Enter");
    browser.await_value("document.documentElement.dataset.explained === '2'");
    await_text(browser, "answer", "No answer: from: wanted is ADDR");
}

/// In the dark, and where there is little room.
fn looks(browser: &mut Browser) {
    browser.value("document.querySelector('details').open = true");
    for (dark, name) in [(false, "chosen"), (true, "dark")] {
        browser.set_dark(dark);
        let is_dark = browser.value("matchMedia('(prefers-color-scheme: dark)').matches");
        assert_eq!(is_dark, dark);
        let contrast = browser.value(LEAST_CONTRAST).as_f64().expect("a number");
        assert!(contrast >= 4.5, "{name}: {contrast}");
        browser.picture(name);
    }
    browser.set_dark(false);
    browser.resize(400, 800);
    let width = browser.value("document.documentElement.scrollWidth");
    assert!(width.as_u64() <= Some(400), "{width}");
    browser.picture("narrow");
    browser.resize(1280, 900);
}
