//! klb: the agent that fills the kernel's maps, and the tool that reads them.

pub mod agent;
pub mod args;
mod aside;
pub mod commands;
pub mod config;
pub mod datapath;
pub mod devices;
pub mod errors;
pub mod ethtool;
pub mod health;
pub mod ids;
pub mod index;
pub mod k8s;
pub mod kube_proxy;
pub mod maglev;
pub mod metrics;
pub mod model;
pub mod netlink;
pub mod netns;
pub mod plan;
pub mod pods;
pub mod privileges;
pub mod reconcile;
pub mod record;
pub mod slots;
pub mod sysctl;
pub mod termination;
