//! A real browser, without a screen, driven by the protocol of its own developer
//! tools over two pipes: no port, no library, nothing but Chromium.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{process::Place, wait};

/// For an answer, or something to come about on the page. A busy machine takes
/// seconds to start a browser.
const PATIENCE: Duration = Duration::from_secs(60);

/// Names that Chromium goes by.
const PROGRAMS: [&str; 3] = ["chromium-headless-shell", "chromium", "chromium-browser"];

/// It starts nothing that asks somebody else, and leaves no trace.
const FLAGS: [&str; 14] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1280,900",
];

/// A browser with one page; ended on drop, with all that it started.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    next: u64,
    events: Vec<Value>,
}

impl Browser {
    /// Opens an address, as somebody at that place would.
    ///
    /// # Panics
    /// If there is no browser, or it does not start.
    pub fn open(place: &Place, address: &str) -> Self {
        let profile = place.scope().new_file("browser");
        fs::create_dir(&profile).unwrap_or_else(|error| panic!("{}: {error}", profile.display()));
        let log = profile.join("log");
        let log = fs::File::create(&log).unwrap_or_else(|error| panic!("{error}"));
        // Its pipes are descriptors 3 and 4.
        let mut command = place.command("/bin/sh");
        command
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh"])
            .arg(program())
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.display()))
            .env("HOME", &profile)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("browser: {error}"));
        let commands = child.stdin.take().expect("piped");
        let output = child.stdout.take().expect("piped");
        let (heard, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in BufReader::new(output).split(0) {
                let Ok(message) = message else { return };
                let message = serde_json::from_slice(&message);
                if heard.send(message.unwrap_or_default()).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self {
            child,
            commands,
            messages,
            session: None,
            next: 0,
            events: Vec::new(),
        };
        browser.attach(address);
        browser
    }

    fn attach(&mut self, address: &str) {
        let page = self.call("Target.createTarget", &json!({"url": "about:blank"}));
        let target = json!({"targetId": page["targetId"], "flatten": true});
        let session = self.call("Target.attachToTarget", &target);
        self.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.call(&format!("{domain}.enable"), &json!({}));
        }
        self.call("Page.navigate", &json!({"url": address}));
    }

    /// Asks for something of the protocol, and waits for the answer.
    ///
    /// # Panics
    /// If it is refused, or no answer comes.
    pub fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut message = json!({"id": id, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let bytes = [message.to_string().as_bytes(), b"\0"].concat();
        let sent = self.commands.write_all(&bytes);
        sent.unwrap_or_else(|error| panic!("{method}: the browser has gone: {error}"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left);
            let mut message = message.unwrap_or_else(|error| panic!("{method}: {error}"));
            if message["id"] != id {
                self.events.push(message);
                continue;
            }
            assert!(message["error"].is_null(), "{method}: {message}");
            return message["result"].take();
        }
    }

    /// The value of an expression in the page.
    ///
    /// # Panics
    /// If it throws.
    pub fn value(&mut self, expression: &str) -> Value {
        let question = json!({
            "expression": expression, "returnByValue": true, "awaitPromise": true,
        });
        let mut answer = self.call("Runtime.evaluate", &question);
        assert!(
            answer["exceptionDetails"].is_null(),
            "{expression}: {answer}"
        );
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true, and returns its value.
    ///
    /// # Panics
    /// If it does not become true.
    pub fn await_value(&mut self, expression: &str) -> Value {
        let value = wait::attempt(PATIENCE, || {
            let value = self.value(expression);
            let holds = match &value {
                Value::Null | Value::Bool(false) => false,
                Value::String(text) => !text.is_empty(),
                Value::Number(number) => number.as_f64() != Some(0.0),
                _ => true,
            };
            holds.then_some(value)
        });
        value.unwrap_or_else(|| {
            let page = self.value("document.body.innerText");
            let complaints = self.complaints();
            panic!("waited for {expression} on {page}, with complaints {complaints:?}")
        })
    }

    /// Presses a key and lets it go, as a keyboard would: `Tab`, `ArrowDown`, `/`.
    ///
    /// # Panics
    /// If the browser refuses.
    pub fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "End" => 35,
            "Home" => 36,
            "ArrowUp" => 38,
            "ArrowDown" => 40,
            _ => 0,
        };
        let mut event = json!({"type": "keyDown", "key": key, "windowsVirtualKeyCode": code});
        match key {
            "Enter" => event["text"] = json!("\r"),
            _ if key.chars().count() == 1 => event["text"] = json!(key),
            _ => event["type"] = json!("rawKeyDown"),
        }
        self.call("Input.dispatchKeyEvent", &event);
        event["type"] = json!("keyUp");
        self.call("Input.dispatchKeyEvent", &event);
    }

    /// Types a text into what has the focus.
    pub fn enter(&mut self, text: &str) {
        for key in text.chars() {
            self.press(&key.to_string());
        }
    }

    /// Gives the page another size, in CSS pixels.
    pub fn resize(&mut self, width: u32, height: u32) {
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false,
        });
        self.call("Emulation.setDeviceMetricsOverride", &size);
    }

    /// Says whether its owner likes it dark.
    pub fn set_dark(&mut self, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", &json!({"features": features}));
    }

    /// Writes a picture of the page for people to look at, if `KLB_TEST_PICTURES`
    /// names a folder for it.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn picture(&mut self, name: &str) {
        let Some(folder) = env::var_os("KLB_TEST_PICTURES") else {
            return;
        };
        let height = self.value("document.documentElement.scrollHeight");
        let width = self.value("innerWidth");
        let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
        let wanted = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
        let picture = self.call("Page.captureScreenshot", &wanted);
        let data = picture["data"].as_str().expect("a picture");
        let data = STANDARD.decode(data).expect("base64");
        let path = Path::new(&folder).join(format!("{name}.png"));
        fs::write(&path, data).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// What went wrong in the page by itself: scripts that throw, and what its
    /// policy forbids. That a request failed is for the page to say.
    pub fn complaints(&self) -> Vec<String> {
        let wrong = self.events.iter().filter(|event| {
            let entry = &event["params"]["entry"];
            match event["method"].as_str() {
                Some("Runtime.exceptionThrown") => true,
                Some("Log.entryAdded") => entry["level"] == "error" && entry["source"] != "network",
                Some("Runtime.consoleAPICalled") => event["params"]["type"] == "error",
                _ => false,
            }
        });
        wrong.map(ToString::to_string).collect()
    }

    /// The addresses that the page has asked for.
    pub fn asked_for(&self) -> Vec<String> {
        let asked = self.events.iter();
        let asked = asked.filter(|event| event["method"] == "Network.requestWillBeSent");
        asked
            .filter_map(|event| event["params"]["request"]["url"].as_str())
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        // An error means that all of them have ended.
        let _ = killpg(group, Signal::SIGKILL);
        drop(self.child.wait());
    }
}

/// `KLB_TEST_BROWSER`, or the first that is found.
fn program() -> String {
    if let Ok(program) = env::var("KLB_TEST_BROWSER") {
        return program;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let has = |name: &&str| env::split_paths(&path).any(|folder| folder.join(name).exists());
    let found = PROGRAMS.iter().find(|name| has(name));
    let found = found.expect("a browser (package chromium-headless-shell, or KLB_TEST_BROWSER)");
    (*found).to_owned()
}
