//! Asking the agent's HTTP endpoints, as a plain client.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::{process::Place, wait};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Clone, Debug)]
pub struct Page {
    pub status: u16,
    /// By name, in small letters.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Page {
    /// The body.
    ///
    /// # Panics
    /// If it is no JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub host: &'a str,
    /// More headers, by name.
    pub headers: &'a [(&'a str, &'a str)],
    /// How long the answer may take.
    pub patience: Duration,
}

impl<'a> Question<'a> {
    /// As a plain client asks.
    pub const fn get(path: &'a str) -> Self {
        Self {
            method: "GET",
            path,
            host: "klb",
            headers: &[],
            patience: PATIENCE,
        }
    }
}

/// Asks for a path from a place.
///
/// # Errors
/// If nobody listens, or no answer comes.
pub fn get(place: &Place, server: SocketAddr, path: &str) -> io::Result<Page> {
    ask(place, server, &Question::get(path))
}

/// Asks from a place.
///
/// # Errors
/// If nobody listens, or no answer comes.
pub fn ask(place: &Place, server: SocketAddr, question: &Question<'_>) -> io::Result<Page> {
    let Question {
        method,
        path,
        host,
        headers,
        patience,
    } = question;
    let headers = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"));
    let headers: String = headers.collect();
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Connection: close\r\n\r\n");
    let answer = place.netns().within(|| {
        let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_read_timeout(Some(*patience))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, io::Error>(answer)
    })?;
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, answer))
}

/// As [`ask`], of an agent that is ready: its servers begin in tasks of their own, by then
/// or a moment later.
///
/// # Panics
/// If no answer comes.
pub fn await_answer(place: &Place, server: SocketAddr, question: &Question<'_>) -> Page {
    let answer = wait::until("a server that listens", PATIENCE, || {
        match ask(place, server, question) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => None,
            answer => Some(answer),
        }
    });
    answer.unwrap_or_else(|error| panic!("{server} {}: {error}", question.path))
}

fn parse(answer: &str) -> Option<Page> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let (first, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let headers = headers.lines().filter_map(|line| line.split_once(": "));
    Some(Page {
        status: first.split(' ').nth(1)?.parse().ok()?,
        headers: headers
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect(),
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_status_headers_and_body() {
        let page = parse("HTTP/1.1 503 No\r\nA-b: c\r\n\r\n{\"x\":1}").expect("an answer");
        assert_eq!(page.status, 503);
        assert_eq!(page.headers["a-b"], "c");
        assert_eq!(page.json()["x"], 1);
        assert!(parse("nonsense").is_none());
    }
}
