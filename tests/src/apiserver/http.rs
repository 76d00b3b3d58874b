//! What goes over the wire: HTTP/1.1, with watches as chunked bodies.

use std::{
    fmt,
    io::{self, BufRead as _, BufReader, Read, Write},
    net::TcpStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::{
    BadEvent, Fault, Refusal, Shared, State,
    store::{Name, bookmark},
};

/// How long a read waits before it is looked whether the connection is cut.
const LOOK: Duration = Duration::from_millis(20);

/// Between two bytes of a slow body.
const SLOW: Duration = Duration::from_micros(50);

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A client.
pub(super) struct Connection {
    stream: BufReader<Box<dyn Stream>>,
}

/// A request, as far as anybody looks at it.
struct Request {
    method: String,
    path: String,
    /// Name and value.
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOK))?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(stream),
            Some(config) => {
                let connection = ServerConnection::new(config).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(connection, stream))
            }
        };
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Serves one request. Returns whether another may follow; fails with
    /// `WouldBlock` if none has come yet.
    pub(super) fn serve_request(&mut self, shared: &Shared, generation: u64) -> io::Result<bool> {
        if self.stream.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let request = self.read_request()?;
        let state = shared.change(|state| {
            state.requests.push(request.line());
            (
                state.faults.refusals.pop(),
                state.token.clone(),
                state.faults.has(Fault::NoStreams),
                state
                    .faults
                    .forbidden
                    .iter()
                    .any(|kind| kind == request.kind()),
            )
        });
        let (refusal, token, no_streaming, is_forbidden) = state;
        if is_forbidden {
            let refusal = Refusal {
                status: 403,
                retry_after: None,
            };
            self.refuse(refusal, "you may not see these")?;
            return Ok(true);
        }
        if let Some(refusal) = refusal {
            self.refuse(refusal, "as the test wants it")?;
            return Ok(true);
        }
        let is_known =
            token.is_none_or(|token| request.header("authorization") == format!("Bearer {token}"));
        if !is_known {
            let refusal = Refusal {
                status: 401,
                retry_after: None,
            };
            self.refuse(refusal, "who are you?")?;
            return Ok(true);
        }
        if request.method != "GET" {
            self.write(shared, &request)?;
            return Ok(true);
        }
        if request.flag("watch") {
            let streaming = request.flag("sendInitialEvents");
            if streaming && no_streaming {
                let refusal = Refusal {
                    status: 422,
                    retry_after: None,
                };
                let reason = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
                self.refuse(refusal, reason)?;
                return Ok(true);
            }
            self.watch(shared, generation, &request, streaming)?;
            return Ok(false);
        }
        match request.object() {
            Some(name) => self.object(shared, &request, &name)?,
            None => self.list(shared, &request)?,
        }
        Ok(true)
    }

    fn object(&mut self, shared: &Shared, request: &Request, name: &Name) -> io::Result<()> {
        let object = shared.lock().store.object(name);
        if let Some(object) = object {
            return self.answer(200, &[], &request.shown(object, false).to_string());
        }
        let refusal = Refusal {
            status: 404,
            retry_after: None,
        };
        self.refuse(refusal, "there is no such object")
    }

    fn read_request(&mut self) -> io::Result<Request> {
        let mut lines = Vec::new();
        loop {
            let line = self.read_line()?;
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        let mut lines = lines.into_iter();
        let first = lines.next().ok_or(io::ErrorKind::InvalidData)?;
        let mut words = first.split(' ').map(str::to_owned);
        let method = words.next().unwrap_or_default();
        let target = words.next().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let headers = lines.filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        });
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let mut request = Request {
            method,
            path: path.to_owned(),
            query: pairs
                .map(|(name, value)| (decode(name), decode(value)))
                .collect(),
            headers: headers.collect(),
            body: Vec::new(),
        };
        request.body = vec![0; request.header("content-length").parse().unwrap_or(0)];
        let mut filled = 0;
        while filled < request.body.len() {
            match self.stream.read(&mut request.body[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(request)
    }

    /// A line of a head, whenever it is complete.
    fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        loop {
            match self.stream.read_until(b'\n', &mut line) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if line.ends_with(b"\n") => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Takes in what a client wants to be written. Of Events it is only
    /// remembered that they came.
    fn write(&mut self, shared: &Shared, request: &Request) -> io::Result<()> {
        if request.method == "DELETE" {
            let done =
                shared.change(|state| request.name().is_some_and(|name| state.store.remove(&name)));
            let (code, state) = if done {
                (200, "Success")
            } else {
                (404, "Failure")
            };
            let answer = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": state, "code": code,
            });
            return self.answer(code, &[], &answer.to_string());
        }
        let object: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let stored = shared.change(|state| {
            if let Some(object) = request.new_object(object.clone()) {
                return state.store.put(object);
            }
            state.posted.push(object.clone());
            object
        });
        self.answer(201, &[], &stored.to_string())
    }

    fn list(&mut self, shared: &Shared, request: &Request) -> io::Result<()> {
        let limit = request.value("limit").and_then(|limit| limit.parse().ok());
        let (page, slow) = shared.change(|state| {
            let next = request.value("continue");
            if next.is_some() && state.faults.present.remove(&Fault::LostPage) {
                return (None, false);
            }
            let page = state
                .store
                .page(next, limit.unwrap_or(usize::MAX), |store| {
                    store.list(request.kind(), |object| request.selects(object))
                });
            (page, state.faults.has(Fault::Slow))
        });
        let Some(page) = page else {
            let refusal = Refusal {
                status: 410,
                retry_after: None,
            };
            return self.refuse(refusal, "the continue token is too old");
        };
        let items: Vec<Value> = page
            .items
            .into_iter()
            .map(|item| request.shown(item, true))
            .collect();
        let body = json!({
            "kind": "List",
            "apiVersion": "v1",
            "metadata": { "resourceVersion": page.version.to_string(), "continue": page.next },
            "items": items,
        });
        if slow {
            return self.answer_slowly(&body.to_string());
        }
        self.answer(200, &[], &body.to_string())
    }

    fn watch(
        &mut self,
        shared: &Shared,
        generation: u64,
        request: &Request,
        streaming: bool,
    ) -> io::Result<()> {
        let seconds = request
            .value("timeoutSeconds")
            .and_then(|seconds| seconds.parse().ok());
        let deadline = Instant::now() + Duration::from_secs(seconds.unwrap_or(290));
        let (gone_at_once, endless) = {
            let state = shared.lock();
            let faults = &state.faults;
            (
                faults.has(Fault::GoneAtOnce),
                faults.has(Fault::EndlessLists),
            )
        };
        let kind = request.kind();
        let selects = |object: &Value| request.selects(object);
        let mut version = request
            .value("resourceVersion")
            .and_then(|version| version.parse().ok())
            .unwrap_or(0);
        let is_gone = || shared.lock().store.events(kind, version, selects).is_none();
        if gone_at_once && !streaming && is_gone() {
            let refusal = Refusal {
                status: 410,
                retry_after: None,
            };
            return self.refuse(refusal, "too old resource version");
        }
        self.stream.get_mut().write_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        )?;
        let mut events = Vec::new();
        if streaming {
            let state = shared.lock();
            version = state.store.version();
            let objects = state.store.list(kind, selects);
            events = objects
                .into_iter()
                .map(|object| json!({ "type": "ADDED", "object": object }))
                .collect();
            if !endless {
                events.push(bookmark(kind, version, true));
            }
        }
        loop {
            for event in events.drain(..) {
                if !self.send_event(shared, request, event)? {
                    return Ok(());
                }
            }
            let mut state = shared.lock();
            loop {
                if state.generation != generation {
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    drop(state);
                    return self.stream.get_mut().write_all(b"0\r\n\r\n");
                }
                match state.store.events(kind, version, selects) {
                    None => {
                        drop(state);
                        let gone = status(410, "too old resource version");
                        self.chunk(
                            &format!("{{\"type\":\"ERROR\",\"object\":{gone}}}\n"),
                            false,
                        )?;
                        return self.stream.get_mut().write_all(b"0\r\n\r\n");
                    }
                    Some((new, now)) if new.is_empty() => version = now,
                    Some((new, now)) => {
                        (events, version) = (new, now);
                        break;
                    }
                }
                let wait = deadline.saturating_duration_since(Instant::now());
                state = shared
                    .news
                    .wait_timeout(state, wait)
                    .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
            }
        }
    }

    /// Returns whether others may follow.
    fn send_event(
        &mut self,
        shared: &Shared,
        request: &Request,
        mut event: Value,
    ) -> io::Result<bool> {
        event["object"] = request.shown(event["object"].take(), false);
        // The type goes before the object, as from a real server: clients read
        // the object without a copy then.
        let line = format!(
            "{{\"type\":{},\"object\":{}}}\n",
            event["type"], event["object"]
        );
        let kind = event["type"].as_str().unwrap_or_default();
        let sent = format!("{kind} {}", request.kind());
        let (bad, slow) = shared.change(|state| {
            state.sent.push(sent);
            (
                take_bad_event(state, request.kind()),
                state.faults.has(Fault::Slow),
            )
        });
        match bad {
            None => self.chunk(&line, slow)?,
            Some(BadEvent::Garbage) => {
                self.chunk("{\"type\": \"MODIFIED\", \"object\": nonsense}\n", slow)?;
            }
            Some(BadEvent::Half) => {
                self.chunk(&line[..line.len() / 2], slow)?;
                return Ok(false);
            }
            Some(BadEvent::Error(code)) => {
                let error = status(code, "as the test wants it");
                self.chunk(
                    &format!("{{\"type\":\"ERROR\",\"object\":{error}}}\n"),
                    slow,
                )?;
                self.stream.get_mut().write_all(b"0\r\n\r\n")?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn chunk(&mut self, text: &str, slow: bool) -> io::Result<()> {
        let head = format!("{:x}\r\n", text.len());
        let stream = self.stream.get_mut();
        stream.write_all(head.as_bytes())?;
        if slow {
            write_slowly(stream, text)?;
        } else {
            stream.write_all(text.as_bytes())?;
        }
        stream.write_all(b"\r\n")?;
        stream.flush()
    }

    fn answer_slowly(&mut self, body: &str) -> io::Result<()> {
        let head = head(200, &[], body.len());
        let stream = self.stream.get_mut();
        stream.write_all(head.as_bytes())?;
        write_slowly(stream, body)
    }

    fn answer(&mut self, status: u16, headers: &[String], body: &str) -> io::Result<()> {
        let head = head(status, headers, body.len());
        let stream = self.stream.get_mut();
        stream.write_all(format!("{head}{body}").as_bytes())?;
        stream.flush()
    }

    fn refuse(&mut self, refusal: Refusal, message: &str) -> io::Result<()> {
        let headers: Vec<_> = refusal
            .retry_after
            .map(|seconds| format!("Retry-After: {seconds}\r\n"))
            .into_iter()
            .collect();
        self.answer(
            refusal.status,
            &headers,
            &status(refusal.status, message).to_string(),
        )
    }
}

fn write_slowly(stream: &mut dyn Write, text: &str) -> io::Result<()> {
    for byte in text.as_bytes() {
        stream.write_all(std::slice::from_ref(byte))?;
        stream.flush()?;
        thread::sleep(SLOW);
    }
    Ok(())
}

fn take_bad_event(state: &mut State, kind: &str) -> Option<BadEvent> {
    let (wanted, event, count) = state.faults.next_events.as_mut()?;
    if wanted != kind || *count == 0 {
        return None;
    }
    *count -= 1;
    Some(*event)
}

fn head(status: u16, headers: &[String], length: usize) -> String {
    let headers = headers.concat();
    format!(
        "HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n"
    )
}

fn status(code: u16, message: &str) -> Value {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

impl Request {
    fn line(&self) -> String {
        let query: Vec<_> = self
            .query
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        format!("{} {}?{}", self.method, self.path, query.join("&"))
    }

    fn header(&self, name: &str) -> &str {
        find(&self.headers, name).unwrap_or_default()
    }

    fn value(&self, name: &str) -> Option<&str> {
        find(&self.query, name)
    }

    fn flag(&self, name: &str) -> bool {
        self.value(name) == Some("true")
    }

    /// The one object that is asked for, if it is in a namespace.
    fn object(&self) -> Option<Name> {
        let (_, path) = self.path.split_once("/namespaces/")?;
        let mut parts = path.split('/');
        let (namespace, kind) = (parts.next()?, parts.next()?);
        Some(Name::new(kind, namespace, parts.next()?))
    }

    /// The last part of the path.
    fn kind(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// The parts of the path behind the version: pairs of kind and name, the
    /// last of which may be a kind alone.
    fn parts(&self) -> Vec<&str> {
        let parts = self.path.split('/').skip_while(|part| *part != "v1");
        parts.skip(1).collect()
    }

    /// The object that the path names.
    fn name(&self) -> Option<Name> {
        match self.parts()[..] {
            ["namespaces", namespace, kind, name] => Some(Name::new(kind, namespace, name)),
            [kind, name] => Some(Name::new(kind, "", name)),
            _ => None,
        }
    }

    /// An object as it is stored: as the client sent it, with what a server
    /// fills in. `None` for kinds that are not.
    fn new_object(&self, mut object: Value) -> Option<Value> {
        let parts = self.parts();
        let (kind, version) = match *parts.last()? {
            "services" => ("Service", "v1"),
            "endpointslices" => ("EndpointSlice", "discovery.k8s.io/v1"),
            "namespaces" => ("Namespace", "v1"),
            _ => return None,
        };
        object["kind"] = json!(kind);
        object["apiVersion"] = json!(version);
        if let ["namespaces", namespace, _] = parts[..] {
            object["metadata"]["namespace"] = json!(namespace);
        }
        if kind == "Service" && object["spec"]["clusterIP"].is_null() {
            object["spec"]["clusterIP"] = json!("10.96.7.7");
        }
        Some(object)
    }

    /// Whether the selectors let an object through: as many of them as agents
    /// use.
    fn selects(&self, object: &Value) -> bool {
        let labels = self.value("labelSelector").unwrap_or_default().split(',');
        let mut labels = labels.filter(|term| !term.is_empty());
        let has_label = |key: &str| object["metadata"]["labels"].get(key).is_some();
        let fields = self.value("fieldSelector").unwrap_or_default().split(',');
        let mut fields = fields.filter(|term| !term.is_empty());
        let is = |field: &str, value: &str| {
            let pointer = format!("/{}", field.replace('.', "/"));
            object
                .pointer(&pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
                == value
        };
        labels.all(|term| match term.strip_prefix('!') {
            Some(key) => !has_label(key),
            None => has_label(term),
        }) && fields.all(|term| match (term.split_once("!="), term.split_once('=')) {
            (Some((field, value)), _) => !is(field, value),
            (None, Some((field, value))) => is(field, value),
            (None, None) => false,
        })
    }

    /// An object as this client wants to see it. Those in a list do not say of
    /// what kind they are.
    fn shown(&self, mut object: Value, in_list: bool) -> Value {
        if self.header("accept").contains("as=PartialObjectMetadata") {
            return json!({
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": object["metadata"],
            });
        }
        if in_list && let Some(object) = object.as_object_mut() {
            object.remove("kind");
            object.remove("apiVersion");
        }
        object
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

fn find<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let mut pairs = pairs.iter();
    pairs
        .find(|(other, _)| other == name)
        .map(|(_, value)| value.as_str())
}

/// Undoes the escapes of a query.
fn decode(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        let escaped = match byte {
            b'%' => {
                let digits: Vec<u8> = bytes.by_ref().take(2).collect();
                let digits = String::from_utf8_lossy(&digits).into_owned();
                u8::from_str_radix(&digits, 16).unwrap_or(b'?')
            }
            b'+' => b' ',
            other => other,
        };
        decoded.push(escaped);
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
