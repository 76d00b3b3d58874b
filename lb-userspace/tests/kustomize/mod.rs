//! As much of kustomize as `deploy/` asks for: what else a file says is an error
//! here. Names of generated objects get no hash behind them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// `deploy/`, or what is in it.
pub(crate) fn deploy(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(path)
}

/// All documents of a YAML file.
pub(crate) fn documents(path: &Path) -> Vec<Value> {
    let text = read(path);
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    let documents = documents.map(|document| {
        Value::deserialize(document).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    });
    documents.filter(|value| !value.is_null()).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    components: Vec<String>,
    #[serde(default)]
    config_map_generator: Vec<ConfigMap>,
    #[serde(default)]
    patches: Vec<Patch>,
    #[serde(default)]
    images: Vec<Image>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigMap {
    name: String,
    namespace: String,
    behavior: Option<String>,
    #[serde(default)]
    literals: Vec<String>,
    #[serde(default)]
    files: Vec<String>,
    #[serde(default)]
    options: Options,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Options {
    #[serde(default, rename = "disableNameSuffixHash")]
    _keep_name: bool,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    target: Target,
    patch: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Image {
    name: String,
    new_name: String,
    new_tag: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields, tag = "op")]
enum Operation {
    Add { path: String, value: Value },
    Replace { path: String, value: Value },
}

/// The objects of a folder.
pub(crate) fn build(folder: &Path) -> Vec<Value> {
    let mut objects = Vec::new();
    accumulate(folder, &mut objects);
    objects
}

fn accumulate(folder: &Path, objects: &mut Vec<Value>) {
    let path = folder.join("kustomization.yaml");
    let kustomization: Kustomization = strict(&documents(&path)[0], &path.display().to_string());
    let is_component = kustomization.kind == "Component";
    let version = if is_component { "v1alpha1" } else { "v1beta1" };
    assert_eq!(
        kustomization.api_version,
        format!("kustomize.config.k8s.io/{version}"),
        "{path:?}"
    );
    for resource in &kustomization.resources {
        let path = folder.join(resource);
        if path.is_dir() {
            accumulate(&path, objects);
        } else {
            objects.append(&mut documents(&path));
        }
    }
    for component in &kustomization.components {
        accumulate(&folder.join(component), objects);
    }
    for generator in &kustomization.config_map_generator {
        generate(folder, generator, objects);
    }
    for patch in &kustomization.patches {
        apply(patch, objects);
    }
    for image in &kustomization.images {
        for object in objects.iter_mut() {
            rename(image, object);
        }
    }
}

fn generate(folder: &Path, generator: &ConfigMap, objects: &mut Vec<Value>) {
    let is_it = |object: &&mut Value| {
        object["kind"] == "ConfigMap"
            && object["metadata"]["name"] == generator.name.as_str()
            && object["metadata"]["namespace"] == generator.namespace.as_str()
    };
    let found = objects.iter_mut().find(is_it);
    let object = match (generator.behavior.as_deref(), found) {
        (Some("merge"), Some(object)) => object,
        (None, None) => {
            objects.push(json!({
                "apiVersion": "v1", "kind": "ConfigMap", "data": {},
                "metadata": { "name": generator.name, "namespace": generator.namespace },
            }));
            objects.last_mut().expect("pushed")
        }
        (behavior, found) => panic!("{behavior:?} of {}: {found:?}", generator.name),
    };
    if !generator.options.labels.is_empty() {
        object["metadata"]["labels"] = json!(generator.options.labels);
    }
    for literal in &generator.literals {
        let (name, value) = literal.split_once('=').expect("NAME=VALUE");
        object["data"][name] = json!(value);
    }
    for file in &generator.files {
        let (name, file) = file.split_once('=').expect("NAME=FILE");
        object["data"][name] = json!(read(&folder.join(file)));
    }
}

fn apply(patch: &Patch, objects: &mut [Value]) {
    let Patch { target, patch } = patch;
    let operations: Vec<Operation> = serde_yaml_ng::from_str(patch).expect("a JSON patch");
    let mut targets = objects.iter_mut().filter(|object| {
        object["kind"] == target.kind.as_str() && object["metadata"]["name"] == target.name.as_str()
    });
    let object = targets.next().unwrap_or_else(|| panic!("no {target:?}"));
    for operation in operations {
        match operation {
            Operation::Add { path, value } => add(object, &path, value),
            Operation::Replace { path, value } => {
                *object
                    .pointer_mut(&path)
                    .unwrap_or_else(|| panic!("no {path}")) = value;
            }
        }
    }
}

fn add(object: &mut Value, path: &str, value: Value) {
    let (parent, name) = path.rsplit_once('/').expect("a path");
    match object.pointer_mut(parent) {
        Some(Value::Array(array)) if name == "-" => array.push(value),
        Some(Value::Object(fields)) => assert!(
            fields.insert(name.to_owned(), value).is_none(),
            "{path} is there"
        ),
        other => panic!("{path}: {other:?}"),
    }
}

/// Gives containers the image that is meant.
fn rename(image: &Image, object: &mut Value) {
    for kind in ["initContainers", "containers"] {
        let containers = object.pointer_mut(&format!("/spec/template/spec/{kind}"));
        let containers = containers.and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            if container["image"] == image.name.as_str() {
                container["image"] = json!(format!("{}:{}", image.new_name, image.new_tag));
            }
        }
    }
}

/// As a type that has a field for everything.
pub(crate) fn strict<T: DeserializeOwned>(value: &Value, what: &str) -> T {
    T::deserialize(value).unwrap_or_else(|error| panic!("{what}: {error}"))
}
