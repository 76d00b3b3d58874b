//! Kubernetes objects and where they come from.

pub mod api;
pub mod convert;
pub mod document;
pub mod events;
mod folder;
pub mod manifests;
pub mod objects;
mod resource;
pub mod source;
mod watch;
