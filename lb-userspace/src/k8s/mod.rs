//! Kubernetes objects and where they come from.

pub mod convert;
pub mod document;
pub mod manifests;
