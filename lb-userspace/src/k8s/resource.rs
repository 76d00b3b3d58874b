//! What manifests and the API have in common: the text of one object → model.

use serde::{Deserialize, Deserializer};

use super::{
    convert::{self, Converted, ObjectError, SERVICE_NAME_LABEL},
    objects::{EndpointSlice, Namespace, Node, Pod, Service},
};
use crate::model::{Concern, Kind, NamespacedName, ObjectRef};

/// A kind of object, as text.
pub(super) trait Resource: for<'de> Deserialize<'de> {
    const KIND: Kind;

    /// What of it klb goes by.
    ///
    /// # Errors
    ///
    /// Names the field that the API server would have refused.
    fn convert(&self, id: NamespacedName) -> Result<Converted, ObjectError>;
}

impl Resource for Service {
    const KIND: Kind = Kind::Service;

    fn convert(&self, id: NamespacedName) -> Result<Converted, ObjectError> {
        convert::service(id, self)
    }
}

impl Resource for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;

    fn convert(&self, id: NamespacedName) -> Result<Converted, ObjectError> {
        convert::endpoint_slice(id, self)
    }
}

impl Resource for Node {
    const KIND: Kind = Kind::Node;

    fn convert(&self, id: NamespacedName) -> Result<Converted, ObjectError> {
        Ok(convert::node(id.name().to_owned(), self))
    }
}

impl Resource for Pod {
    const KIND: Kind = Kind::Pod;

    fn convert(&self, id: NamespacedName) -> Result<Converted, ObjectError> {
        convert::pod(id, self)
    }
}

impl Resource for Namespace {
    const KIND: Kind = Kind::Namespace;

    fn convert(&self, id: NamespacedName) -> Result<Converted, ObjectError> {
        Ok(convert::namespace(id, self))
    }
}

/// Reads an object whose name is known.
///
/// # Errors
///
/// Names the field that is not as it should be.
pub(super) fn read<'de, R: Resource>(
    text: impl Deserializer<'de>,
    id: NamespacedName,
) -> Result<Converted, ObjectError> {
    let resource: R = match serde_path_to_error::deserialize(text) {
        Ok(resource) => resource,
        Err(error) => {
            return Err(ObjectError {
                object: ObjectRef { kind: R::KIND, id },
                field: error.path().to_string(),
                message: error.into_inner().to_string(),
            });
        }
    };
    resource.convert(id)
}

/// Whom an object concerns, from what can be read of one that makes no sense.
/// `label` gives the value of a label.
pub(super) fn concern<'a>(
    kind: Kind,
    id: &NamespacedName,
    label: impl FnOnce(&str) -> Option<&'a str>,
) -> Concern {
    match kind {
        Kind::Service => Concern::Service(id.clone()),
        Kind::EndpointSlice => label(SERVICE_NAME_LABEL).map_or(Concern::Anyone, |name| {
            Concern::Service(NamespacedName::new(id.namespace(), name))
        }),
        Kind::Node | Kind::Pod | Kind::Namespace => Concern::NoOne,
    }
}
