//! The text of a manifest → objects, one document at a time.
//!
//! YAML is read by `serde_yaml_ng`, the maintained continuation of
//! `serde_yaml`; kube uses the same data model, so what `kubectl` takes is
//! taken here.

use serde_json::Value;

use super::{
    convert::{Converted, ObjectError},
    objects, resource,
};
use crate::model::{Concern, Kind, NamespacedName, Object, ObjectRef};

/// What a document describes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    pub objects: Vec<Object>,
    pub warnings: Vec<DocumentError>,
}

/// Why a document, or an item of a list in it, is skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentError {
    /// As far as it is known.
    pub object: Option<ObjectRef>,
    /// Path of the field, if it is one field's fault.
    pub field: Option<String>,
    pub message: String,
    pub concern: Concern,
}

impl DocumentError {
    /// An error of a document that does not say what it describes.
    fn anonymous(field: Option<&str>, message: String) -> Self {
        Self {
            object: None,
            field: field.map(str::to_owned),
            message,
            concern: Concern::Anyone,
        }
    }

    fn of(error: ObjectError, concern: &Concern) -> Self {
        Self {
            object: Some(error.object),
            field: Some(error.field),
            message: error.message,
            concern: concern.clone(),
        }
    }
}

/// What a document, or an item of a list in it, describes.
pub type Outcome = Result<Document, DocumentError>;

/// What each document of a text describes: one result, or one for each item of
/// a list.
pub fn read_all(text: &str) -> Vec<Vec<Outcome>> {
    split(text).into_iter().map(read_document).collect()
}

/// Cuts a text at its document markers. A line that begins with three dashes
/// and a space, or is nothing else, is one wherever it stands (YAML 1.2, 9.1.2);
/// cutting first means that a broken document does not take the others along.
fn split(text: &str) -> Vec<&str> {
    let mut documents = Vec::new();
    let mut start = 0;
    let mut position = 0;
    for line in text.split_inclusive('\n') {
        let rest = line.strip_prefix("---");
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            documents.push(&text[start..position]);
            start = position;
        }
        position += line.len();
    }
    documents.push(&text[start..]);
    // What stands before the first marker is a document only if it says
    // something, and so is each: numbers count documents as a reader would.
    documents.retain(|document| {
        let mut lines = document
            .lines()
            .map(|line| line.trim_start_matches("---").trim());
        lines.any(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with('%'))
    });
    documents
}

fn read_document(text: &str) -> Vec<Outcome> {
    match serde_yaml_ng::from_str::<Value>(text) {
        Ok(value) => read_value(value),
        Err(error) => {
            let message = format!("no valid YAML: {error}");
            vec![Err(DocumentError::anonymous(None, message))]
        }
    }
}

fn read_value(value: Value) -> Vec<Outcome> {
    let kind = value.get("kind").and_then(Value::as_str);
    if kind.is_some_and(|kind| kind.ends_with("List"))
        && let Some(Value::Array(items)) = value.get("items")
    {
        return items.iter().cloned().flat_map(read_value).collect();
    }
    vec![read_object(value)]
}

fn read_object(value: Value) -> Outcome {
    let text = |pointer| value.pointer(pointer).and_then(Value::as_str);
    let (api_version, kind) = (text("/apiVersion"), text("/kind"));
    let (Some(api_version), Some(kind)) = (api_version, kind) else {
        let field = if kind.is_some() { "apiVersion" } else { "kind" };
        let message = "is missing, so this is no Kubernetes object".to_owned();
        return Err(DocumentError::anonymous(Some(field), message));
    };
    let kind = match (api_version, kind) {
        ("v1", "Service") => Kind::Service,
        ("discovery.k8s.io/v1", "EndpointSlice") => Kind::EndpointSlice,
        ("v1", "Node") => Kind::Node,
        ("v1", "Pod") => Kind::Pod,
        ("v1", "Namespace") => Kind::Namespace,
        (version, kind) if is_unknown_version(version, kind) => {
            let message = format!("{version:?} is no version of {kind} that klb knows");
            return Err(DocumentError::anonymous(Some("apiVersion"), message));
        }
        _ => {
            tracing::debug!(kind, api_version, "none of klb's business");
            return Ok(Document::default());
        }
    };
    let Some(name) = text("/metadata/name").filter(|name| !name.is_empty()) else {
        let message = format!("is missing in a {kind}");
        return Err(DocumentError::anonymous(Some("metadata.name"), message));
    };
    let namespace = if kind.is_namespaced() {
        text("/metadata/namespace").unwrap_or("default")
    } else {
        ""
    };
    let id = NamespacedName::new(namespace, name);
    let labels = value.pointer("/metadata/labels");
    let label = |name: &str| labels.and_then(|labels| labels.get(name)?.as_str());
    let concern = resource::concern(kind, &id, label);
    let converted = read(kind, id, value).map_err(|error| DocumentError::of(error, &concern))?;
    let warnings = converted.warnings.into_iter();
    Ok(Document {
        objects: converted.object.into_iter().collect(),
        warnings: warnings
            .map(|warning| DocumentError::of(warning, &concern))
            .collect(),
    })
}

/// Whether an object of Kubernetes' own groups has another version than the one
/// that is known. Other groups have kinds of these names too.
fn is_unknown_version(version: &str, kind: &str) -> bool {
    match kind {
        "Service" | "Node" | "Pod" | "Namespace" => !version.contains('/'),
        "EndpointSlice" => version.starts_with("discovery.k8s.io/"),
        _ => false,
    }
}

fn read(kind: Kind, id: NamespacedName, value: Value) -> Result<Converted, ObjectError> {
    match kind {
        Kind::Service => resource::read::<objects::Service>(value, id),
        Kind::EndpointSlice => resource::read::<objects::EndpointSlice>(value, id),
        Kind::Node => resource::read::<objects::Node>(value, id),
        Kind::Pod => resource::read::<objects::Pod>(value, id),
        Kind::Namespace => resource::read::<objects::Namespace>(value, id),
    }
}

#[cfg(test)]
mod tests;
