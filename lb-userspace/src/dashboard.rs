//! The dashboard: a page beside `/metrics`, and the JSON that it asks for.
//!
//! Nobody can change anything here, and nobody's question is in the way of the
//! agent's work: maps are read in a thread that runs last (`desk`), and what was
//! read is good for all who ask soon; `klb explain` is a process of its own
//! (`explain`), and there is one at a time. The page is for the node itself, or
//! for the one address that it was told to listen on (`guard`).

mod desk;
mod explain;
mod guard;
mod list;
mod nice;
mod page;
mod query;

use std::{net::SocketAddr, sync::Arc};

use hyper::{
    StatusCode,
    header::{CACHE_CONTROL, HeaderValue},
};
use serde_json::json;
use tokio::sync::watch;

use self::{
    desk::{Desk, Sources, Wanted},
    explain::Explainer,
    list::Selection,
    page::Page,
    query::Query,
};
use crate::{
    args::Paths,
    commands::PortId,
    datapath::load::LoadError,
    health::{
        View,
        http::{Answer, Asked},
    },
    metrics::ServiceTraffic,
};

const JSON: &str = "application/json";

/// Below this is what the page asks for.
const API: &str = "/api/";

/// All that the dashboard answers by.
pub struct Dashboard {
    bound: SocketAddr,
    paths: Paths,
    page: Page,
    desk: Desk,
    explainer: Explainer,
}

/// Whose dashboard it is.
#[derive(Debug)]
pub struct Subject<'a> {
    pub node_name: &'a str,
    pub paths: &'a Paths,
    /// Where it is served.
    pub bound: SocketAddr,
    /// As `/readyz` has it.
    pub ready: watch::Receiver<bool>,
    /// As `/livez` has it.
    pub view: View,
}

impl Dashboard {
    /// # Errors
    ///
    /// If a map is not there.
    pub fn new(subject: Subject<'_>, traffic: Arc<ServiceTraffic>) -> Result<Self, LoadError> {
        let Subject {
            node_name,
            paths,
            bound,
            ready,
            view,
        } = subject;
        let sources = Sources::open(node_name, paths, traffic, ready, view)?;
        Ok(Self {
            bound,
            paths: paths.clone(),
            page: Page::new(),
            desk: Desk::new(sources),
            explainer: Explainer::new(),
        })
    }

    /// Answers whatever is not asked of somebody else.
    pub(crate) async fn answer(&self, asked: &Asked) -> Answer {
        let answer = match guard::admit(asked, self.bound) {
            Ok(()) if asked.path().starts_with(API) => match self.tell(asked).await {
                Ok(answer) => answer,
                Err(refusal) => refusal.into(),
            },
            Ok(()) if asked.path() == "/" => self.page.answer(),
            Ok(()) => Answer::not_found(),
            Err(refusal) => refusal.into(),
        };
        page::sealed(answer).with(CACHE_CONTROL, HeaderValue::from_static("no-store"))
    }

    async fn tell(&self, asked: &Asked) -> Result<Answer, Refusal> {
        let mut query = Query::parse(asked.query())?;
        let wanted = match asked.path() {
            "/api/status" => Wanted::Status,
            "/api/services" => Wanted::Services(Selection::of(&mut query)?),
            "/api/service" => Wanted::Port(PortId {
                namespace: query.needed("namespace")?,
                name: query.needed("name")?,
                port_name: query.text("port_name").unwrap_or_default(),
            }),
            "/api/explain" => {
                let question = explain::question(&mut query, &self.paths)?;
                query.end()?;
                return self.explainer.answer(&question).await;
            }
            path => {
                return Err(Refusal::new(
                    StatusCode::NOT_FOUND,
                    format!("there is no {path}"),
                ));
            }
        };
        query.end()?;
        let text = self.desk.read(wanted).await?;
        Ok(Answer::new(StatusCode::OK, JSON, text))
    }
}

/// Why there is no answer, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    status: StatusCode,
    sentence: String,
}

impl Refusal {
    fn new(status: StatusCode, sentence: impl Into<String>) -> Self {
        let sentence = sentence.into();
        Self { status, sentence }
    }

    /// What is asked makes no sense.
    fn wrong(sentence: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, sentence)
    }

    /// Something is wrong here.
    fn failed(sentence: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, sentence)
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let Refusal { status, sentence } = refusal;
        Self::new(status, JSON, json!({ "error": sentence }).to_string())
    }
}
