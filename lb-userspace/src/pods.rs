//! Which pods of this node want their sockets left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::model::{Namespace, NamespacedName, Pod};

/// What is known of the node's pods.
#[derive(Debug, Default)]
pub struct Pods {
    node: String,
    by_name: BTreeMap<NamespacedName, Pod>,
    /// What namespaces say of all their pods.
    namespaces: BTreeMap<String, bool>,
}

impl Pods {
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            ..Self::default()
        }
    }

    /// Takes in a pod, new or changed.
    pub fn apply(&mut self, pod: Pod) {
        if pod.node == self.node {
            self.by_name.insert(pod.id.clone(), pod);
        } else {
            self.by_name.remove(&pod.id);
        }
    }

    pub fn delete(&mut self, pod: &NamespacedName) {
        self.by_name.remove(pod);
    }

    /// Takes in a namespace, new or changed.
    pub fn apply_namespace(&mut self, namespace: Namespace) {
        match namespace.socket_lb {
            Some(wanted) => self.namespaces.insert(namespace.name, wanted),
            None => self.namespaces.remove(&namespace.name),
        };
    }

    pub fn delete_namespace(&mut self, name: &str) {
        self.namespaces.remove(name);
    }

    /// The addresses of the pods that opted out. What a pod says goes before
    /// what its namespace says.
    pub fn opted_out(&self) -> BTreeSet<IpAddr> {
        let pods = self.by_name.values().filter(|pod| {
            let namespaces = self.namespaces.get(pod.id.namespace());
            !pod.socket_lb.or(namespaces.copied()).unwrap_or(true)
        });
        pods.flat_map(|pod| pod.ips.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, last: u8, socket_lb: Option<bool>) -> Pod {
        Pod {
            id: NamespacedName::new("shop", name),
            node: "here".to_owned(),
            ips: vec![[10, 244, 0, last].into()],
            socket_lb,
        }
    }

    fn namespace(socket_lb: Option<bool>) -> Namespace {
        Namespace {
            name: "shop".to_owned(),
            socket_lb,
        }
    }

    /// The last bytes of the addresses.
    fn opted_out(pods: &Pods) -> Vec<u8> {
        let addresses = pods.opted_out().into_iter();
        addresses
            .map(|addr| match addr {
                IpAddr::V4(addr) => addr.octets()[3],
                IpAddr::V6(addr) => panic!("{addr}"),
            })
            .collect()
    }

    #[test]
    fn a_pod_speaks_for_itself_and_else_its_namespace() {
        let mut pods = Pods::new("here");
        pods.apply(pod("silent", 1, None));
        pods.apply(pod("out", 2, Some(false)));
        pods.apply(pod("in", 3, Some(true)));
        assert_eq!(opted_out(&pods), [2]);
        pods.apply_namespace(namespace(Some(false)));
        assert_eq!(opted_out(&pods), [1, 2]);
        pods.apply_namespace(namespace(None));
        assert_eq!(opted_out(&pods), [2]);
        pods.apply_namespace(namespace(Some(false)));
        pods.delete_namespace("shop");
        pods.delete(&NamespacedName::new("shop", "out"));
        assert_eq!(opted_out(&pods), [0; 0]);
    }

    #[test]
    fn pods_of_other_nodes_do_not_matter() {
        let mut pods = Pods::new("here");
        pods.apply(pod("out", 2, Some(false)));
        let elsewhere = Pod {
            node: "there".to_owned(),
            ..pod("out", 3, Some(false))
        };
        pods.apply(elsewhere);
        assert_eq!(opted_out(&pods), [0; 0]);
    }
}
