//! The agent with an API server that somebody else made: `KLB_TEST_KUBECONFIG`
//! names its kubeconfig. The same is done with the tests' own server, always.

use std::{
    env, fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    discovery::v1::EndpointSlice,
    events::v1::Event,
};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ListParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use lb_tests::{
    agent::Hooks,
    apiserver::ApiServer,
    manifests::NODE,
    proxy::Proxy,
    topology::{Addresses, Family},
    traffic::{Protocol, Request},
    world::PODS,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::{self, Runtime};

/// A namespace of the test's own in the cluster. Removed on drop, with all that
/// is in it.
struct Own {
    runtime: Runtime,
    client: Client,
    name: String,
}

impl Own {
    fn new(kubeconfig: &Path) -> Self {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let client = runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
            Client::try_from(config.expect("a way to a server")).expect("a client")
        });
        let own = Self {
            runtime,
            client,
            name: format!("klb-test-{}", process::id()),
        };
        let namespace = json!({ "metadata": { "name": own.name } });
        let namespaces: Api<Namespace> = Api::all(own.client.clone());
        own.create(&namespaces, namespace);
        own
    }

    fn create<K>(&self, api: &Api<K>, object: Value) -> K
    where
        K: Clone + std::fmt::Debug + serde::Serialize + DeserializeOwned,
    {
        let object: K = serde_json::from_value(object).expect("an object");
        let created = self
            .runtime
            .block_on(api.create(&PostParams::default(), &object));
        created.expect("the server takes it")
    }

    fn services(&self) -> Api<Service> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    fn slices(&self) -> Api<EndpointSlice> {
        Api::namespaced(self.client.clone(), &self.name)
    }
}

/// What the agent told of a node that is in no cluster, in the namespace where
/// everybody's nodes are told of.
const NODE_EVENTS: &str = "default";

impl Own {
    /// Removes the Events of the agent about its node.
    fn remove_events(&self) {
        let events: Api<Event> = Api::namespaced(self.client.clone(), NODE_EVENTS);
        let list = self.runtime.block_on(events.list(&ListParams::default()));
        let list = match list {
            Ok(list) => list,
            Err(error) => return eprintln!("Events of {NODE} are left: {error}"),
        };
        for event in list {
            let node = event.regarding.and_then(|object| object.name);
            let name = event.metadata.name.unwrap_or_default();
            if node.as_deref() != Some(NODE) || event.reporting_controller.as_deref() != Some("klb")
            {
                continue;
            }
            let deleted = self
                .runtime
                .block_on(events.delete(&name, &DeleteParams::default()));
            if let Err(error) = deleted {
                eprintln!("Event {name} is left: {error}");
            }
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.remove_events();
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let params = DeleteParams::default();
        let deleted = self
            .runtime
            .block_on(namespaces.delete(&self.name, &params));
        if let Err(error) = deleted {
            eprintln!("namespace {} is left: {error}", self.name);
        }
    }
}

/// A Service that selects nothing: the test says who its endpoints are.
fn service() -> Value {
    json!({
        "metadata": { "name": "web" },
        "spec": { "type": "NodePort", "ports": [{ "name": "http", "port": 80, "targetPort": 3000 }] },
    })
}

fn slice(name: &str, pod: u8) -> Value {
    json!({
        "metadata": { "name": name, "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 3000, "protocol": "TCP" }],
        "endpoints": [{ "addresses": [Addresses::pod(pod).ip(Family::V4)] }],
    })
}

/// A copy of a kubeconfig whose server is the other end of a proxy, in the
/// agent's namespace.
fn through(proxy: &Proxy, kubeconfig: &Path, folder: &Path) -> std::path::PathBuf {
    let (mut config, _) = server_of(kubeconfig);
    let from = kubeconfig.parent().unwrap_or(Path::new("/"));
    for cluster in config["clusters"].as_array_mut().into_iter().flatten() {
        let cluster = &mut cluster["cluster"];
        let server = cluster["server"].as_str().unwrap_or_default().to_owned();
        let (scheme, host) = server.split_once("://").expect("a URL");
        if scheme == "https" && cluster["tls-server-name"].is_null() {
            let name = host.split(['/', ':']).next().unwrap_or_default();
            cluster["tls-server-name"] = json!(name);
        }
        cluster["server"] = json!(format!("{scheme}://{}", proxy.address));
        absolute(cluster, "certificate-authority", from);
    }
    for user in config["users"].as_array_mut().into_iter().flatten() {
        for field in ["client-certificate", "client-key", "tokenFile"] {
            absolute(&mut user["user"], field, from);
        }
    }
    let path = folder.join("through-proxy");
    fs::write(&path, config.to_string()).expect("a file");
    path
}

fn absolute(object: &mut Value, field: &str, folder: &Path) {
    if let Some(path) = object[field].as_str() {
        object[field] = json!(folder.join(path));
    }
}

/// The file, and host and port of the first server.
fn server_of(kubeconfig: &Path) -> (Value, String) {
    let text = fs::read_to_string(kubeconfig).expect("a kubeconfig");
    let config: Value = serde_yaml_ng::from_str(&text).expect("YAML");
    let server = config["clusters"][0]["cluster"]["server"].as_str();
    let (scheme, rest) = server.expect("a server").split_once("://").expect("a URL");
    let host = rest.split('/').next().unwrap_or_default();
    let port = if scheme == "https" { 443 } else { 80 };
    let host = if host.rsplit(']').next().is_some_and(|end| end.contains(':')) {
        host.to_owned()
    } else {
        format!("{host}:{port}")
    };
    (config, host)
}

/// A Service is created, found, asked, given other endpoints, and deleted.
fn follows(kubeconfig: &Path) {
    let mut world = crate::stopped_world(Hooks::ALL);
    let node = world.cluster.node.place.clone();
    let proxy = Proxy::start(node.netns(), server_of(kubeconfig).1);
    let folder = world.cluster.scope().folder();
    world.agent.kubeconfig = Some(through(&proxy, kubeconfig, &folder));
    world.agent.start();

    let own = Own::new(kubeconfig);
    let created = own.create(&own.services(), service());
    let spec = created.spec.expect("a spec");
    let ip: IpAddr = spec
        .cluster_ip
        .as_deref()
        .expect("an address")
        .parse()
        .expect("an address");
    own.create(&own.slices(), slice("web-1", PODS[0].1));
    let frontend = SocketAddr::new(ip, 80);
    let leads_to = |world: &lb_tests::world::World, pods: &[u8]| {
        let wanted: Vec<_> = pods
            .iter()
            .map(|pod| Addresses::pod(*pod).ip(Family::V4))
            .collect();
        let namespace = own.name.clone();
        world
            .agent
            .await_services(&format!("{frontend} to lead to {wanted:?}"), |services| {
                let mut ports = services.iter().filter(|port| port.namespace == namespace);
                let Some(port) = ports.next() else {
                    return wanted.is_empty();
                };
                let mut frontends = port.frontends.iter();
                let found = frontends.find(|found| found.address == ip && found.port == 80);
                found.is_some_and(|found| {
                    let mut backends: Vec<_> = found
                        .backends
                        .iter()
                        .map(|backend| backend.address)
                        .collect();
                    backends.sort();
                    backends == wanted
                })
            });
    };
    leads_to(&world, &[PODS[0].1]);
    let request = Request::new(Protocol::Tcp, frontend);
    let answer = world.cluster.client.host.ask(&request).expect("an answer");
    assert_eq!(answer.name, PODS[0].0);
    own.create(&own.slices(), slice("web-2", PODS[1].1));
    leads_to(&world, &[PODS[0].1, PODS[1].1]);
    // What happens while there is no agent is made up for by the next one.
    world.agent.kill();
    let deleted = own
        .runtime
        .block_on(own.slices().delete("web-1", &DeleteParams::default()));
    deleted.expect("it is there");
    world.agent.start();
    leads_to(&world, &[PODS[1].1]);
    let deleted = own
        .runtime
        .block_on(own.services().delete("web", &DeleteParams::default()));
    deleted.expect("it is there");
    leads_to(&world, &[]);
    // Here and elsewhere, for clients that are led to nobody elsewhere.
    let mut local = service();
    local["metadata"]["name"] = json!("local");
    local["spec"]["internalTrafficPolicy"] = json!("Local");
    local["spec"]["clusterIP"] = json!(ip.to_string());
    own.create(&own.services(), local);
    for (number, node) in [NODE, "elsewhere"].into_iter().enumerate() {
        let mut slice = slice(&format!("local-{node}"), PODS[number].1);
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!("local");
        slice["endpoints"][0]["nodeName"] = json!(node);
        own.create(&own.slices(), slice);
    }
    leads_to(&world, &[PODS[0].1]);
}

#[test]
fn follows_a_real_server() {
    let Some(kubeconfig) = env::var_os("KLB_TEST_KUBECONFIG") else {
        // `cargo xtask test` says so.
        return;
    };
    follows(Path::new(&kubeconfig));
}

#[test]
fn follows_the_tests_own_server_in_the_same_way() {
    let server = ApiServer::start_tls();
    let folder = lb_tests::scope::Scope::test();
    follows(&server.kubeconfig(&folder.folder()));
}
