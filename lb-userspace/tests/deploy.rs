//! `deploy/`: what it says is what Kubernetes understands, and what the agent
//! needs.

mod kustomize;

use std::{collections::BTreeSet, fmt::Debug, fs, path::Path, time::Duration};

use clap::Parser as _;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, ObjectReference, PodSpec, Service, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use kube::runtime::events::{Event as Published, EventType, Recorder};
use lb_tests::apiserver::ApiServer;
use lb_userspace::{
    args::{AgentArgs, Cli, Command},
    k8s::{
        api::Connection,
        events::{Events, Reason},
        source::{ApiSource, Ears, Source},
    },
    metrics::ApiMetrics,
    model::{Event, Kind, NamespacedName, ObjectRef, Scope},
    privileges,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::timeout;

use self::kustomize::{build, deploy, documents, strict};

/// Every folder that `kubectl apply -k` takes.
const KUSTOMIZATIONS: [&str; 5] = [
    ".",
    "overlays/kubeadm",
    "overlays/kind",
    "overlays/k3s",
    "cleanup",
];

/// Those in which the agent is.
fn installations() -> impl Iterator<Item = &'static str> {
    KUSTOMIZATIONS.into_iter().filter(|name| *name != "cleanup")
}

/// What is built with these components on top of an overlay.
fn with_components(overlay: &str, components: &[&str]) -> Vec<Value> {
    let folder = TempDir::new().expect("a temporary folder");
    let path = |path: &str| deploy(path).display().to_string();
    let components: Vec<_> = components.iter().map(|name| path(name)).collect();
    let kustomization = serde_json::json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [path(overlay)], "components": components,
    });
    let file = folder.path().join("kustomization.yaml");
    fs::write(file, kustomization.to_string()).expect("a file");
    build(folder.path())
}

/// Everything that may come of `deploy/`, with a name for it.
fn builds() -> Vec<(String, Vec<Value>)> {
    let plain = KUSTOMIZATIONS.map(|name| (name.to_owned(), build(&deploy(name))));
    let components = [
        &["components/beside-kube-proxy"][..],
        &["components/monitoring"],
    ];
    let more = installations().flat_map(|name| {
        components.map(|chosen| (format!("{name} {chosen:?}"), with_components(name, chosen)))
    });
    plain.into_iter().chain(more).collect()
}

/// The types of the Prometheus operator, as far as `deploy/` uses them.
mod operator {
    use std::collections::BTreeMap;

    use super::{Deserialize, LabelSelector, ObjectMeta, Serialize};

    #[derive(Deserialize, Serialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Custom<T> {
        api_version: String,
        kind: String,
        metadata: ObjectMeta,
        pub(super) spec: T,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct ServiceMonitor {
        job_label: String,
        pub(super) selector: LabelSelector,
        pub(super) endpoints: Vec<Endpoint>,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Endpoint {
        pub(super) port: String,
        interval: String,
        relabelings: Vec<Relabeling>,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Relabeling {
        source_labels: Vec<String>,
        target_label: String,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct PrometheusRule {
        pub(super) groups: Vec<Group>,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Group {
        name: String,
        pub(super) rules: Vec<Rule>,
    }

    #[derive(Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Rule {
        pub(super) alert: String,
        expr: String,
        #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
        duration: Option<String>,
        pub(super) labels: BTreeMap<String, String>,
        pub(super) annotations: BTreeMap<String, String>,
    }
}

/// Reads an object into a type; what the type has no field for would be lost.
fn whole<T: DeserializeOwned + Serialize>(object: &Value, what: &str) -> T {
    let typed: T = strict(object, what);
    let back = serde_json::to_value(&typed).expect("JSON");
    assert_eq!(back, *object, "{what}");
    typed
}

#[test]
fn every_object_is_one_that_kubernetes_knows() {
    for (name, objects) in builds() {
        let mut ids = BTreeSet::new();
        for object in objects {
            let kind = object["kind"].as_str().expect("a kind").to_owned();
            let what = format!("{name}: {kind} {}", object["metadata"]["name"]);
            match kind.as_str() {
                "ServiceAccount" => drop(whole::<ServiceAccount>(&object, &what)),
                "ClusterRole" => drop(whole::<ClusterRole>(&object, &what)),
                "ClusterRoleBinding" => drop(whole::<ClusterRoleBinding>(&object, &what)),
                "ConfigMap" => drop(whole::<ConfigMap>(&object, &what)),
                "Service" => drop(whole::<Service>(&object, &what)),
                "DaemonSet" => drop(whole::<DaemonSet>(&object, &what)),
                "ServiceMonitor" => {
                    drop(whole::<operator::Custom<operator::ServiceMonitor>>(
                        &object, &what,
                    ));
                }
                "PrometheusRule" => {
                    drop(whole::<operator::Custom<operator::PrometheusRule>>(
                        &object, &what,
                    ));
                }
                other => panic!("{name}: {other}"),
            }
            assert!(ids.insert(what.clone()), "{what} twice");
        }
    }
}

#[test]
fn every_file_is_part_of_something() {
    for folder in ["base", "cleanup", "components/monitoring"] {
        let path = deploy(folder).join("kustomization.yaml");
        let text = fs::read_to_string(path).expect("a file");
        for entry in fs::read_dir(deploy(folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name();
            let name = name.to_str().expect("UTF-8");
            assert!(
                name == "kustomization.yaml" || text.contains(name),
                "{folder}/{name}"
            );
        }
    }
    for parent in ["overlays", "components"] {
        for entry in fs::read_dir(deploy(parent)).expect("a folder") {
            let folder = entry.expect("an entry").path();
            assert!(folder.join("kustomization.yaml").exists(), "{folder:?}");
        }
    }
}

fn daemon_set(objects: &[Value]) -> DaemonSet {
    let mut found = objects
        .iter()
        .filter(|object| object["kind"] == "DaemonSet");
    let found = found.next().expect("a DaemonSet");
    strict(found, "DaemonSet")
}

fn pod(objects: &[Value]) -> PodSpec {
    let spec = daemon_set(objects).spec;
    spec.template.spec.expect("a spec of pods")
}

/// The container that runs klb.
fn klb(pod: &PodSpec) -> &Container {
    let mut containers = pod.init_containers.iter().flatten().chain(&pod.containers);
    let is_it = |container: &&Container| {
        let image = container.image.as_deref();
        image.is_some_and(|image| image.starts_with("localhost/klb:"))
    };
    containers.find(is_it).expect("a container")
}

/// A container's variables that are settings of klb, as the flags that they are
/// named after.
fn settings(container: &Container, objects: &[Value]) -> Vec<String> {
    let own = container.env.iter().flatten();
    let mut variables: Vec<_> = own
        .filter_map(|variable| Some((variable.name.clone(), variable.value.clone()?)))
        .collect();
    for from in container.env_from.iter().flatten() {
        let name = &from.config_map_ref.as_ref().expect("a ConfigMap").name;
        let mut maps = objects.iter().filter(|object| {
            object["kind"] == "ConfigMap" && object["metadata"]["name"] == name.as_str()
        });
        let map: ConfigMap = strict(maps.next().expect("the ConfigMap"), name);
        variables.extend(map.data.into_iter().flatten());
    }
    let flags = variables.into_iter().filter_map(|(name, value)| {
        let flag = name.strip_prefix("KLB_")?.to_lowercase().replace('_', "-");
        Some(format!("--{flag}={value}"))
    });
    flags.collect()
}

/// What clap makes of a container's command line and variables.
fn parsed(container: &Container, objects: &[Value]) -> Command {
    let args = container.args.iter().flatten().cloned();
    let line = ["klb".to_owned()].into_iter().chain(args);
    let line = line.chain(settings(container, objects));
    let cli = Cli::try_parse_from(line.chain(node_name(container)));
    cli.unwrap_or_else(|error| panic!("{error}")).command
}

fn node_name(container: &Container) -> Option<String> {
    let mut variables = container.env.iter().flatten();
    let variable = variables.find(|variable| variable.name == "NODE_NAME")?;
    let source = variable.value_from.as_ref()?.field_ref.as_ref()?;
    Some(format!("--node-name={}", source.field_path))
}

fn agent(objects: &[Value]) -> Box<AgentArgs> {
    match parsed(klb(&pod(objects)), objects) {
        Command::Agent(args) => args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_agent_understands_what_it_is_told() {
    for name in installations() {
        let args = agent(&build(&deploy(name)));
        assert_eq!(args.node_name, "spec.nodeName", "{name}");
        assert_eq!(
            args.kubeconfig.is_some(),
            name.ends_with("kubeadm") || name.ends_with("kind")
        );
    }
    let objects = build(&deploy("cleanup"));
    let args = parsed(klb(&pod(&objects)), &objects);
    let Command::Cleanup(args) = args else {
        panic!("{args:?}");
    };
    assert!(args.drain);
    assert_eq!(args.paths.bpffs, agent(&build(&deploy("."))).paths.bpffs);
}

/// Each path that klb is told is a mount, or below one.
#[test]
fn what_the_agent_works_on_is_mounted() {
    for (name, objects) in builds() {
        let pod = pod(&objects);
        let container = klb(&pod);
        let mounts: Vec<_> = container
            .volume_mounts
            .iter()
            .flatten()
            .map(|mount| {
                let mut volumes = pod.volumes.iter().flatten();
                let is_there = volumes.any(|volume| volume.name == mount.name);
                assert!(is_there, "{name}: no volume {}", mount.name);
                Path::new(&mount.mount_path)
            })
            .collect();
        let is_mounted = |path: &Path| mounts.iter().any(|mount| path.starts_with(mount));
        let paths = match parsed(container, &objects) {
            Command::Agent(args) => {
                let hooks = args.hooks;
                let mut paths = vec![args.paths.bpffs, args.paths.state_dir, hooks.netns_dir];
                paths.push(hooks.cgroup.expect("the host's"));
                paths.extend(args.kubeconfig);
                paths
            }
            Command::Cleanup(args) => vec![args.paths.bpffs, args.paths.state_dir],
            other => panic!("{other:?}"),
        };
        for path in paths {
            assert!(is_mounted(&path), "{name}: {path:?} of {mounts:?}");
        }
        assert!(is_mounted(Path::new("/host/proc/sys/net/ipv4")), "{name}");
    }
}

#[test]
fn probes_ask_where_the_agent_answers() {
    for (name, objects) in builds() {
        if name == "cleanup" {
            continue;
        }
        let pod = pod(&objects);
        let container = klb(&pod);
        let bind = agent(&objects).healthz_bind;
        for (probe, path) in [
            (&container.liveness_probe, "/livez"),
            (&container.readiness_probe, "/readyz"),
        ] {
            let probe = probe.as_ref().and_then(|probe| probe.http_get.as_ref());
            let probe = probe.expect("a probe");
            let port = serde_json::to_value(&probe.port).expect("JSON");
            assert_eq!(port, bind.port(), "{name}");
            assert_eq!(probe.path.as_deref(), Some(path), "{name}");
        }
    }
}

#[test]
fn metrics_are_scraped_where_the_agent_answers() {
    let objects = with_components(".", &["components/monitoring"]);
    let bind = agent(&objects).metrics_bind;
    assert!(bind.ip().is_unspecified());
    let find = |kind: &str| {
        let mut found = objects.iter().filter(|object| object["kind"] == kind);
        found.next().expect("an object")
    };
    let service: Service = strict(find("Service"), "Service");
    let spec = service.spec.expect("a spec");
    let monitor: operator::Custom<operator::ServiceMonitor> =
        strict(find("ServiceMonitor"), "ServiceMonitor");
    let ports = spec.ports.expect("ports");
    assert_eq!(ports[0].port, i32::from(bind.port()));
    assert_eq!(
        ports[0].name.as_ref(),
        Some(&monitor.spec.endpoints[0].port)
    );
    let labels = daemon_set(&objects).spec.template.metadata;
    assert_eq!(spec.selector, labels.expect("metadata").labels);
    assert_eq!(service.metadata.labels, monitor.spec.selector.match_labels);
}

#[test]
fn every_alert_says_what_is_wrong_and_what_it_means() {
    let rules = documents(&deploy("components/monitoring/prometheusrule.yaml"));
    let rules: operator::Custom<operator::PrometheusRule> = strict(&rules[0], "PrometheusRule");
    let mut names = BTreeSet::new();
    for rule in rules.spec.groups.iter().flat_map(|group| &group.rules) {
        let name = &rule.alert;
        assert!(names.insert(name), "{name} twice");
        assert!(
            ["warning", "critical"].contains(&rule.labels["severity"].as_str()),
            "{name}"
        );
        for annotation in ["summary", "description"] {
            assert!(rule.annotations.contains_key(annotation), "{name}");
        }
    }
}

/// The YAML in a page of `docs/`, by the line that it begins with.
fn example(page: &str, first: &str) -> Value {
    let path = deploy("../docs").join(page);
    let text = fs::read_to_string(path).expect("a page");
    let (_, rest) = text
        .split_once(&format!("```yaml\n{first}\n"))
        .expect("an example");
    let (example, _) = rest.split_once("```").expect("its end");
    serde_yaml_ng::from_str(&format!("{first}\n{example}")).expect("YAML")
}

/// What klb keeps of root's power is what it is given.
#[test]
fn capabilities_are_those_that_the_agent_keeps() {
    let kept = privileges::KEPT.map(|(capability, _)| {
        let name = capability.to_string();
        name.trim_start_matches("CAP_").to_owned()
    });
    let kept = BTreeSet::from(kept);
    let documented = example("privileges.md", "securityContext:");
    for (name, objects) in builds() {
        let pod = pod(&objects);
        let context = klb(&pod).security_context.as_ref().expect("a context");
        assert_eq!(context.privileged, None, "{name}");
        assert_eq!(context.allow_privilege_escalation, Some(false), "{name}");
        let capabilities = context.capabilities.as_ref().expect("capabilities");
        let added = capabilities.add.iter().flatten().cloned();
        assert_eq!(added.collect::<BTreeSet<_>>(), kept, "{name}");
        let written = serde_json::to_value(capabilities).expect("JSON");
        assert_eq!(
            written, documented["securityContext"]["capabilities"],
            "{name}"
        );
    }
}

fn rules() -> Vec<PolicyRule> {
    let objects = documents(&deploy("base/rbac.yaml"));
    let mut roles = objects
        .iter()
        .filter(|object| object["kind"] == "ClusterRole");
    let role: ClusterRole = strict(roles.next().expect("a role"), "ClusterRole");
    role.rules.expect("rules")
}

#[test]
fn the_page_about_health_has_the_role() {
    let documented = example("health.md", "rules:");
    let written = serde_json::to_value(rules()).expect("JSON");
    assert_eq!(written, documented["rules"]);
}

/// API group, resource and verb.
type Access = (String, String, String);

/// What a request takes: method, and path with its query.
fn access(request: &str) -> Access {
    let (method, path) = request.split_once(' ').expect("a method");
    let (path, query) = path.split_once('?').expect("a query");
    let parts: Vec<_> = path.split('/').skip(1).collect();
    let (group, rest) = match &parts[..] {
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", group, "v1", rest @ ..] => (*group, rest),
        _ => panic!("{request}"),
    };
    let (resource, has_name) = match rest {
        ["namespaces", _, resource] | [resource] => (*resource, false),
        ["namespaces", _, resource, _] | [resource, _] => (*resource, true),
        _ => panic!("{request}"),
    };
    let watches = query.split('&').any(|flag| flag.starts_with("watch"));
    let verb = match method {
        "GET" if watches => "watch",
        "GET" if has_name => "get",
        "GET" => "list",
        "POST" => "create",
        "PATCH" => "patch",
        _ => panic!("{request}"),
    };
    (group.to_owned(), resource.to_owned(), verb.to_owned())
}

/// What the role allows, one by one.
fn allowed() -> BTreeSet<Access> {
    let mut allowed = BTreeSet::new();
    for rule in rules() {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                let accesses = rule
                    .verbs
                    .iter()
                    .map(|verb| (group.clone(), resource.clone(), verb.clone()));
                allowed.extend(accesses);
            }
        }
    }
    allowed
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(30);
    let result = timeout(limit, future).await;
    result.unwrap_or_else(|_elapsed| panic!("waiting for {what}"))
}

/// All that the agent reads, from a server that has to be asked for pages.
async fn read_everything(connection: &Connection, events: &Events) {
    let client = connection.client().await.expect("a client");
    let ears = Ears {
        events: events.clone(),
        metrics: ApiMetrics::register(&mut prometheus_client::registry::Registry::default()),
        recorder: lb_userspace::record::Recorder::default(),
    };
    let source = ApiSource::start(connection.clone(), ears, &client, "node-1", true);
    let mut source = Source::Api(Box::new(source));
    let mut missing = BTreeSet::from([Scope::Services, Scope::Pods]);
    while !missing.is_empty() {
        for event in within("lists", source.next()).await {
            if let Event::Synced(scope) = event {
                missing.remove(&scope);
            }
        }
    }
}

/// Something of an object of each kind.
fn tell_everything(events: &Events) {
    for kind in [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::Pod,
        Kind::Namespace,
    ] {
        let namespace = if kind.is_namespaced() { "default" } else { "" };
        let about = ObjectRef {
            kind,
            id: NamespacedName::new(namespace, "a"),
        };
        events.tell(Reason::InvalidObject, about, "a test");
    }
}

/// The same once more: kube's recorder makes it part of the first Event. klb does
/// not tell it again before five minutes have passed.
async fn tell_twice(connection: &Connection) {
    let client = connection.client().await.expect("a client");
    let recorder = Recorder::new(client, "klb".into());
    let event = Published {
        type_: EventType::Normal,
        reason: "Starting".to_owned(),
        note: None,
        action: "StartKlb".to_owned(),
        secondary: None,
    };
    let regarding = ObjectReference::default();
    for _ in 0..2 {
        let published = recorder.publish(&event, &regarding);
        published.await.expect("published");
    }
}

fn assert_same<T: Debug + Ord>(found: &BTreeSet<T>, wanted: &BTreeSet<T>) {
    let (more, fewer): (Vec<_>, Vec<_>) = (
        found.difference(wanted).collect(),
        wanted.difference(found).collect(),
    );
    assert!(more.is_empty(), "asked for and not allowed: {more:?}");
    assert!(fewer.is_empty(), "allowed and not asked for: {fewer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_allows_what_the_agent_asks_for_and_no_more() {
    let folder = TempDir::new().expect("a temporary folder");
    let server = ApiServer::start();
    server.set_streaming(false);
    let connection = Connection::new(Some(&server.kubeconfig(folder.path())));
    let (events, poster) = Events::new(connection.clone(), "node-1");
    let poster = tokio::spawn(poster);
    read_everything(&connection, &events).await;
    tell_everything(&events);
    within("events", async {
        while server.posted().len() < 5 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    tell_twice(&connection).await;
    poster.abort();
    let asked = server
        .requests()
        .iter()
        .map(|request| access(request))
        .collect();
    assert_same(&asked, &allowed());
}
