//! The objects, and what happened to them.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    /// Plural and in small letters, as in paths.
    pub(super) kind: String,
    namespace: String,
    own: String,
}

impl Name {
    pub(super) fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self {
            kind: kind.to_owned(),
            namespace: namespace.to_owned(),
            own: name.to_owned(),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Store {
    version: u64,
    objects: BTreeMap<Name, Value>,
    changes: Vec<Change>,
    /// Changes up to this version are forgotten.
    forgotten: u64,
    /// Version at which every watch is told where it is.
    bookmark: u64,
    /// What is left of lists that are read in pages.
    pages: HashMap<String, Vec<Value>>,
    last_page: u64,
}

#[derive(Debug)]
struct Change {
    version: u64,
    kind: String,
    before: Option<Value>,
    after: Option<Value>,
}

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) items: Vec<Value>,
    pub(super) version: u64,
    /// Where the next one begins.
    pub(super) next: Option<String>,
}

impl Store {
    /// Returns the object as it is stored.
    pub(super) fn put(&mut self, mut object: Value) -> Value {
        let kind = object["kind"].as_str().expect("a kind").to_lowercase() + "s";
        let text = |pointer| object.pointer(pointer).and_then(Value::as_str);
        let is_namespaced = kind != "nodes" && kind != "namespaces";
        let namespace = match text("/metadata/namespace") {
            Some(namespace) => namespace,
            None if is_namespaced => "default",
            None => "",
        };
        let name = Name::new(&kind, namespace, text("/metadata/name").expect("a name"));
        self.version += 1;
        if is_namespaced {
            object["metadata"]["namespace"] = json!(name.namespace);
        }
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let before = self.objects.insert(name, object.clone());
        self.changes.push(Change {
            version: self.version,
            kind,
            before,
            after: Some(object.clone()),
        });
        object
    }

    /// Deletes an object, and what is in it if it is a namespace. Returns
    /// whether it was there.
    pub(super) fn remove(&mut self, name: &Name) -> bool {
        if name.kind == "namespaces" {
            let inside = self
                .objects
                .keys()
                .filter(|other| other.namespace == name.own);
            let inside: Vec<_> = inside.cloned().collect();
            for other in inside {
                self.delete(&other);
            }
        }
        let is_there = self.objects.contains_key(name);
        if is_there {
            self.delete(name);
        }
        is_there
    }

    pub(super) fn delete(&mut self, name: &Name) {
        let before = self.objects.remove(name);
        assert!(before.is_some(), "{name:?} is not there");
        self.version += 1;
        self.changes.push(Change {
            version: self.version,
            kind: name.kind.clone(),
            before,
            after: None,
        });
    }

    pub(super) fn forget_history(&mut self) {
        self.forgotten = self.version;
        self.changes.clear();
    }

    pub(super) fn bookmark(&mut self) {
        self.version += 1;
        self.bookmark = self.version;
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn object(&self, name: &Name) -> Option<Value> {
        self.objects.get(name).cloned()
    }

    /// Everything that is selected, at the present version.
    pub(super) fn list(&self, kind: &str, selected: impl Fn(&Value) -> bool) -> Vec<Value> {
        let objects = self.objects.iter();
        let objects = objects.filter(|(name, object)| name.kind == kind && selected(object));
        objects.map(|(_, object)| object.clone()).collect()
    }

    /// A page of a list: its first, or the one that was announced as next.
    pub(super) fn page(
        &mut self,
        next: Option<&str>,
        limit: usize,
        list: impl FnOnce(&Self) -> Vec<Value>,
    ) -> Option<Page> {
        let mut items = match next {
            Some(next) => self.pages.remove(next)?,
            None => list(self),
        };
        let rest = items.split_off(limit.min(items.len()));
        self.last_page += 1;
        let next = (!rest.is_empty()).then(|| format!("page-{}", self.last_page));
        if let Some(next) = &next {
            self.pages.insert(next.clone(), rest);
        }
        Some(Page {
            items,
            version: self.version,
            next,
        })
    }

    /// The events after a version, as a watch with these selectors sees them;
    /// and the version that it has then. `None` if they are forgotten.
    pub(super) fn events(
        &self,
        kind: &str,
        since: u64,
        selected: impl Fn(&Value) -> bool,
    ) -> Option<(Vec<Value>, u64)> {
        if since < self.forgotten {
            return None;
        }
        let changes = self.changes.iter();
        let changes = changes.filter(|change| change.version > since && change.kind == kind);
        let mut events: Vec<_> = changes
            .filter_map(|change| change.event(&selected))
            .collect();
        if since < self.bookmark {
            events.push(bookmark(kind, self.version, false));
        }
        Some((events, self.version))
    }
}

impl Change {
    /// What it is to a watch: an object that begins to be selected is added,
    /// one that ceases to be is deleted.
    fn event(&self, selected: impl Fn(&Value) -> bool) -> Option<Value> {
        let before = self.before.as_ref().filter(|object| selected(object));
        let after = self.after.as_ref().filter(|object| selected(object));
        match (before, after) {
            (None, Some(object)) => Some(json!({ "type": "ADDED", "object": object })),
            (Some(_), Some(object)) => Some(json!({ "type": "MODIFIED", "object": object })),
            (Some(object), None) => {
                let mut object = object.clone();
                object["metadata"]["resourceVersion"] = json!(self.version.to_string());
                Some(json!({ "type": "DELETED", "object": object }))
            }
            (None, None) => None,
        }
    }
}

/// Tells a watch where it is; with `end`, that its list is complete.
pub(super) fn bookmark(kind: &str, version: u64, end: bool) -> Value {
    let mut metadata = json!({ "resourceVersion": version.to_string() });
    if end {
        metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    json!({ "type": "BOOKMARK", "object": { "kind": kind, "apiVersion": "v1", "metadata": metadata } })
}
