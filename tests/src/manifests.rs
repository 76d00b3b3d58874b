//! Manifests of Services, EndpointSlices and Nodes, as an operator writes them,
//! in a folder that an agent watches.

use std::{
    fmt::{self, Write as _},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::{
    topology::{Addresses, Family},
    traffic::Protocol,
};

impl Protocol {
    /// As Kubernetes spells it.
    pub const fn kubernetes(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

/// Manifests of so many Services, each with two endpoints that nobody has.
///
/// # Panics
/// If there are more than addresses for them.
pub fn many(services: u16) -> String {
    let mut text = String::new();
    for number in 0..services {
        let [high, low] = number.to_be_bytes();
        write!(
            text,
            "apiVersion: v1\nkind: Service\n\
             metadata:\n  name: many-{number}\n  namespace: default\n\
             spec:\n  clusterIP: 10.97.{high}.{low}\n  clusterIPs: [10.97.{high}.{low}]\n  \
             ports:\n  - port: 80\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata:\n  name: many-{number}\n  namespace: default\n  labels:\n    \
             kubernetes.io/service-name: many-{number}\n\
             addressType: IPv4\nports:\n- port: 8080\nendpoints:\n\
             - addresses: [10.200.{high}.{low}]\n- addresses: [10.201.{high}.{low}]\n---\n"
        )
        .expect("a string grows");
    }
    text
}

/// A port of a Service.
#[derive(Clone, Debug)]
pub struct Port {
    pub name: &'static str,
    pub protocol: Protocol,
    pub port: u16,
    pub target: u16,
    /// 0 for none.
    pub node_port: u16,
}

/// A dual-stack Service; [`fmt::Display`] is its manifest.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub addresses: Addresses,
    pub ports: Vec<Port>,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            addresses: Addresses { v4, v6 },
            ports,
        } = self;
        let has_node_ports = ports.iter().any(|port| port.node_port != 0);
        let kind = if has_node_ports {
            "NodePort"
        } else {
            "ClusterIP"
        };
        write!(
            f,
            "apiVersion: v1\n\
             kind: Service\n\
             metadata:\n  name: {name}\n  namespace: default\n\
             spec:\n  type: {kind}\n  ipFamilyPolicy: RequireDualStack\n  \
             ipFamilies: [IPv4, IPv6]\n  clusterIP: {v4}\n  \
             clusterIPs: [\"{v4}\", \"{v6}\"]\n  ports:\n"
        )?;
        for port in ports {
            write!(
                f,
                "  - name: {}\n    protocol: {}\n    port: {}\n    targetPort: {}\n",
                port.name,
                port.protocol.kubernetes(),
                port.port,
                port.target
            )?;
            if port.node_port != 0 {
                writeln!(f, "    nodePort: {}", port.node_port)?;
            }
        }
        Ok(())
    }
}

/// The endpoints of a [`Service`]: a document for each family.
#[derive(Clone, Debug)]
pub struct Endpoints<'a> {
    pub service: &'a Service,
    /// Names and addresses of pods that are ready.
    pub pods: Vec<(String, Addresses)>,
}

impl fmt::Display for Endpoints<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let documents = Family::ALL.map(|family| self.slice(family));
        f.write_str(&documents.join("---\n"))
    }
}

impl Endpoints<'_> {
    fn slice(&self, family: Family) -> String {
        let service = &self.service.name;
        let suffix = family.to_string().to_lowercase();
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\n\
             kind: EndpointSlice\n\
             metadata:\n  name: {service}-{suffix}\n  namespace: default\n  labels:\n    \
             kubernetes.io/service-name: {service}\n\
             addressType: {family}\n\
             ports:\n"
        );
        for port in &self.service.ports {
            write!(
                text,
                "- name: {}\n  protocol: {}\n  port: {}\n",
                port.name,
                port.protocol.kubernetes(),
                port.target
            )
            .expect("a string grows");
        }
        text += "endpoints:\n";
        for (name, addresses) in &self.pods {
            let address = addresses.ip(family);
            text += &endpoint(name, address);
        }
        if self.pods.is_empty() {
            text = text.replace("endpoints:\n", "endpoints: []\n");
        }
        text
    }
}

fn endpoint(pod: &str, address: IpAddr) -> String {
    format!(
        "- addresses: [\"{address}\"]\n  \
         conditions: {{ready: true, serving: true, terminating: false}}\n  \
         nodeName: {NODE}\n  \
         targetRef: {{kind: Pod, namespace: default, name: {pod}}}\n"
    )
}

/// Name of the cluster's node.
pub const NODE: &str = "node-1";

/// Manifest of the cluster's node.
pub fn node() -> String {
    let Addresses { v4, v6 } = Addresses::NODE;
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {NODE}\n\
         status:\n  addresses:\n  - {{type: InternalIP, address: \"{v4}\"}}\n  \
         - {{type: InternalIP, address: \"{v6}\"}}\n"
    )
}

/// The folder that an agent watches.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// # Panics
    /// If it cannot be made.
    pub fn create(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a file there, or in the place of another, by rename: nobody sees
    /// half of it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn put(&self, file: &str, text: &str) {
        let hidden = self.path.join(format!(".{file}.new"));
        fs::write(&hidden, text)
            .and_then(|()| fs::rename(&hidden, self.path.join(file)))
            .unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// Writes a file where it is, as an editor may.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn overwrite(&self, file: &str, text: &str) {
        fs::write(self.path.join(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// # Panics
    /// If it cannot be removed.
    pub fn remove(&self, file: &str) {
        fs::remove_file(self.path.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}
