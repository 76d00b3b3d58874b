//! The text of a file → settings.

use std::{fs, path::Path};

use serde::Deserialize as _;
use serde_yaml_ng::{Deserializer, Mapping, Value};

use super::{
    Setting,
    kube_proxy::{self, Translation},
};

/// What a file is about.
#[derive(Debug)]
pub(super) enum File {
    /// Fields by the names of klb's flags.
    Own(Vec<Setting>),
    /// A file of kube-proxy's.
    KubeProxy(Translation),
}

/// # Errors
///
/// A sentence that names the field, if it is one field's fault.
pub(super) fn read(path: &Path) -> Result<File, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    parse(&text)
}

pub(super) fn parse(text: &str) -> Result<File, String> {
    let fields = document(text)?;
    let word = |name: &str| fields.get(name).and_then(Value::as_str);
    match (word("apiVersion"), word("kind")) {
        (None, None) if !fields.contains_key("kind") => own(&fields).map(File::Own),
        (Some(version), Some(kube_proxy::KIND)) if version == kube_proxy::API_VERSION => {
            kube_proxy::of_file(&fields).map(File::KubeProxy)
        }
        (_, Some(kube_proxy::KIND)) => Err(format!(
            "apiVersion: the {} that klb understands is of {}",
            kube_proxy::KIND,
            kube_proxy::API_VERSION
        )),
        _ => Err(format!(
            "kind: wanted is a file of klb's own, which has no kind, or a {}",
            kube_proxy::KIND
        )),
    }
}

/// The one document of a text; empty if it says nothing.
fn document(text: &str) -> Result<Mapping, String> {
    let mut documents = Deserializer::from_str(text).map(Value::deserialize);
    let first = documents.next().transpose();
    let first = first.map_err(|error| error.to_string())?;
    if documents.next().is_some() {
        return Err("wanted is one document".to_owned());
    }
    match first.unwrap_or_default() {
        Value::Null => Ok(Mapping::new()),
        Value::Mapping(fields) => Ok(fields),
        _ => Err("wanted are fields, such as `routing: bypass`".to_owned()),
    }
}

fn own(fields: &Mapping) -> Result<Vec<Setting>, String> {
    let mut settings = Vec::new();
    for (name, value) in fields {
        let field = name_of(name)?;
        let values = texts(value).ok_or_else(|| format!("{field}: wanted is a value or a list"))?;
        settings.push(Setting {
            flag: field.clone(),
            field,
            values,
        });
    }
    Ok(settings)
}

pub(super) fn name_of(key: &Value) -> Result<String, String> {
    let name = key.as_str();
    name.map(str::to_owned)
        .ok_or_else(|| format!("{}: the name of a field is a word", written(key)))
}

/// A value, or those of a list, as somebody would type them; `None` if they have
/// fields of their own.
pub(super) fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Bool(value) => Some(vec![value.to_string()]),
        Value::Number(value) => Some(vec![value.to_string()]),
        Value::String(value) => Some(vec![value.clone()]),
        Value::Sequence(values) => {
            let values: Option<Vec<_>> = values.iter().map(texts).collect();
            Some(values?.concat())
        }
        Value::Mapping(_) | Value::Tagged(_) => None,
    }
}

fn written(value: &Value) -> String {
    let text = serde_yaml_ng::to_string(value).unwrap_or_default();
    text.trim().to_owned()
}
