use std::{fs, net::SocketAddr};

use super::{agent as agent_of, variable as variable_of, *};
use crate::args::{AgentArgs, Routing, XdpChoice};

/// An agent with these flags, and with a file if it says something.
fn agent(file: &str, flags: &[&str]) -> Result<Box<AgentArgs>, String> {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("klb.yaml");
    fs::write(&path, file).expect("written");
    let path = path.display().to_string();
    let mut line = vec!["klb", "agent"];
    if !file.is_empty() {
        line.extend(["--config", &path]);
    }
    line.extend(flags);
    let cli = parse(line.into_iter().map(OsString::from)).map_err(|error| {
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    })?;
    match cli.command {
        Subcommand::Agent(args) => Ok(args),
        other => panic!("{other:?}"),
    }
}

/// With a node's name, which every agent has.
fn named(file: &str, flags: &[&str]) -> Result<Box<AgentArgs>, String> {
    agent(file, &[&["--node-name", "n"], flags].concat())
}

fn file_of_kube_proxy(fields: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}")
}

#[test]
fn a_field_is_a_flag_without_dashes() {
    let file = "
node-name: from-the-file
routing: bypass
map-flows: 4711
timeout-udp: 41s
uplink: [eth0, 'bond*']
pod-device: cali*,lxc*
nodeport-addresses:
manifests: d
";
    let args = agent(file, &[]).expect("understood");
    assert_eq!(args.node_name, "from-the-file");
    assert_eq!(args.routing, Routing::Bypass);
    assert_eq!(args.sizes.map_flows, 4711);
    assert_eq!(args.timeouts.timeout_udp, 41);
    assert_eq!(args.devices.uplink, ["eth0", "bond*"]);
    assert_eq!(args.devices.pod_device, ["cali*", "lxc*"]);
    assert!(args.devices.nodeport_addresses.is_empty());
    assert_eq!(args.manifests, Some("d".into()));
    assert_eq!(args.hooks.xdp, XdpChoice::Auto, "not in the file");
}

/// Whatever comes to the flags, the file can set it and the environment too.
#[test]
fn every_flag_is_a_field_and_a_variable() {
    let command = command();
    for arg in settings(agent_of(&command)) {
        let flag = arg.get_long().expect("a name");
        let variable = arg
            .get_env()
            .and_then(|name| name.to_str())
            .expect("a variable");
        let wanted = if flag == "node-name" {
            "NODE_NAME".to_owned()
        } else {
            variable_of(flag)
        };
        assert_eq!(variable, wanted);
        assert_eq!(arg.get_id().as_str(), id(flag), "as `id` has it");
        assert!(settable(agent_of(&command), flag).is_some(), "{flag}");
        // What the kubelet sets for a Service of that name.
        for taken in ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"] {
            assert!(!variable.contains(&format!("{taken}_")) && !variable.ends_with(taken));
        }
    }
}

#[test]
fn a_flag_goes_before_the_file() {
    let file = "node-name: file\nuplink: [eth0, eth1]\nxdp: off\ntimeout-udp: 41s\n";
    let flags = ["--node-name", "flag", "--uplink", "bond0", "--xdp=native"];
    let args = agent(file, &flags).expect("understood");
    assert_eq!(args.node_name, "flag");
    assert_eq!(args.devices.uplink, ["bond0"], "and not added to it");
    assert_eq!(args.hooks.xdp, XdpChoice::Native);
    assert_eq!(args.timeouts.timeout_udp, 41);
}

#[test]
fn a_source_that_a_flag_names_goes_before_that_of_the_file() {
    let args = named("manifests: d\n", &["--kubeconfig", "f"]).expect("understood");
    assert_eq!((args.manifests, args.kubeconfig), (None, Some("f".into())));
    let error = named("manifests: d\nkubeconfig: f\n", &[]).expect_err("refused");
    assert!(
        error.contains("manifests: cannot be used with `kubeconfig`"),
        "{error}"
    );
}

#[test]
fn what_is_wrong_in_a_file_is_named() {
    for (file, words) in [
        (
            "xdp: sometimes\n",
            &["klb.yaml: xdp:", "sometimes", "auto, native"][..],
        ),
        ("xdp: [auto, off]\n", &["xdp:", "one value"]),
        (
            "timeout-udp: 500ms\n",
            &["timeout-udp:", "a second or more"],
        ),
        ("map-flows: 0\n", &["map-flows:", "0"]),
        (
            "nodeport-addresses: [10.0.0.0/8, primary]\n",
            &["nodeport-addresses:", "192.0.2.0/24"],
        ),
        ("node-name: ''\n", &["node-name:", "a value is wanted"]),
        ("routing: {a: b}\n", &["routing:", "a value or a list"]),
        ("routng: bypass\n", &["routng:", "no such field"]),
        (
            "nodePortAddresses: []\nuplink: x\n",
            &["there is no such field", "`nodeport-addresses`"],
        ),
        ("config: other.yaml\n", &["config:", "no such field"]),
        ("help: x\n", &["help:", "no such field"]),
        (
            "cluster-cidr: 10.0.0.0/8\n",
            &["cluster-cidr:", "no such field"],
        ),
        ("5: x\n", &["5: the name of a field is a word"]),
        ("xdp: off\nxdp: off\n", &["duplicate"]),
        ("xdp: off\n---\nxdp: off\n", &["one document"]),
        ("- xdp\n", &["wanted are fields"]),
        ("kind: Pod\n", &["kind:", "KubeProxyConfiguration"]),
        (
            "kind: KubeProxyConfiguration\n",
            &["apiVersion:", "v1alpha1"],
        ),
    ] {
        let error = named(file, &[]).expect_err(file);
        for word in words {
            assert!(error.contains(word), "{file}: no {word:?} in {error}");
        }
    }
    let error = named("", &["--config", "/nowhere/klb.yaml"]).expect_err("refused");
    assert!(error.contains("/nowhere/klb.yaml: No such file"), "{error}");
}

#[test]
fn a_required_flag_that_is_nowhere_is_missed() {
    for file in ["", "xdp: off\n"] {
        let error = agent(file, &[]).expect_err("refused");
        assert!(error.contains("--node-name"), "{error}");
    }
}

/// As kubeadm writes it.
const KUBEADM: &str = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: \"\"
  burst: 0
  contentType: \"\"
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: \"\"
  interfaceNamePrefix: \"\"
detectLocalMode: \"\"
enableProfiling: false
healthzBindAddress: \"\"
hostnameOverride: \"\"
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: \"\"
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: \"0\"
    text:
      infoBufferSize: \"0\"
  verbosity: 0
metricsBindAddress: \"\"
mode: \"\"
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: \"\"
showHiddenMetricsForVersion: \"\"
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: \"\"
  rootHnsEndpointName: \"\"
  sourceVip: \"\"
";

#[test]
fn the_file_that_kubeadm_writes_is_understood() {
    let args = agent(KUBEADM, &["--hostname-override=Node-1"]).expect("understood");
    assert_eq!(args.node_name, "node-1");
    assert_eq!(
        args.kubeconfig,
        Some("/var/lib/kube-proxy/kubeconfig.conf".into())
    );
    let default = named("", &[]).expect("understood");
    assert_eq!(args.timeouts.by_state(), default.timeouts.by_state());
    assert_eq!(args.healthz_bind, default.healthz_bind);
    assert_eq!(args.metrics_bind, default.metrics_bind);
    let [note] = args.notes.as_slice() else {
        panic!("{:?}", args.notes)
    };
    assert!(
        note.contains(": clusterCIDR (klb knows pods by their devices"),
        "{note}"
    );
    assert!(!note.contains(';'), "nothing else: {note}");
}

#[test]
fn what_klb_has_too_is_taken_over() {
    let file = file_of_kube_proxy(
        "
hostnameOverride: ' N '
healthzBindAddress: 0.0.0.0
metricsBindAddress: 10.0.0.1:80
nodePortAddresses: [10.0.0.0/8, 'fd00::/8']
detectLocalMode: InterfaceNamePrefix
detectLocal: {interfaceNamePrefix: tap, bridgeInterface: br0}
logging: {format: json}
conntrack: {tcpEstablishedTimeout: 1h0m0s, tcpCloseWaitTimeout: 30m, udpTimeout: 31s, udpStreamTimeout: 1m1s}
",
    );
    let args = agent(&file, &[]).expect("understood");
    assert_eq!(args.node_name, "n");
    assert_eq!(args.healthz_bind.to_string(), "0.0.0.0:10256");
    assert_eq!(args.metrics_bind.to_string(), "10.0.0.1:80");
    assert_eq!(args.devices.nodeport_addresses.len(), 2);
    assert_eq!(args.devices.pod_device, ["tap*"]);
    let timeouts = args.timeouts;
    assert_eq!(timeouts.timeout_tcp_established, 3600);
    assert_eq!(timeouts.timeout_tcp_close_wait, 1800);
    assert_eq!(
        (timeouts.timeout_udp, timeouts.timeout_udp_stream),
        (31, 61)
    );
    // Flags go before its file too.
    let args = agent(
        &file,
        &["--timeout-udp", "5s", "--conntrack-udp-timeout-stream=6s"],
    );
    let timeouts = args.expect("understood").timeouts;
    assert_eq!((timeouts.timeout_udp, timeouts.timeout_udp_stream), (5, 6));
}

#[test]
fn flags_of_kube_proxys_are_understood() {
    let line = "--hostname-override N --metrics-bind-address ::1 --healthz-bind-address=10.0.0.1 \
        --conntrack-tcp-timeout-established 0 --conntrack-udp-timeout=1m0s --cluster-cidr=10.0.0.0/8 \
        --masquerade-all=false --profiling --ipvs-udp-timeout=7s -v 2 --logging-format json";
    let flags: Vec<_> = line.split_whitespace().collect();
    let args = agent("", &flags).expect("understood");
    assert_eq!(args.node_name, "n");
    assert_eq!(args.metrics_bind.to_string(), "[::1]:10249");
    assert_eq!(args.healthz_bind.to_string(), "10.0.0.1:10256");
    assert_eq!(args.timeouts.timeout_tcp_established, 24 * 3600);
    assert_eq!(args.timeouts.timeout_udp, 60);
    assert_eq!(args.timeouts.timeout_udp_stream, 120, "not in this mode");
    let note = args.notes.concat();
    for word in ["--cluster-cidr (", "--profiling (", "--v (`RUST_LOG`"] {
        assert!(note.contains(word), "no {word} in {note}");
    }
    assert!(!note.contains("masquerade"), "{note}");
    let args = named("", &["--proxy-mode=ipvs", "--ipvs-udp-timeout=7s"]).expect("understood");
    assert_eq!(args.timeouts.timeout_udp_stream, 7);
}

#[test]
fn what_kube_proxy_would_do_otherwise_is_refused_by_name() {
    for (fields, words) in [
        (
            "iptables: {masqueradeAll: true}",
            &["iptables.masqueradeAll: remove it"][..],
        ),
        (
            "mode: nftables\nnodePortAddresses: [10.0.0.0/8]\nnftables: {masqueradeAll: true}",
            &["nftables.masqueradeAll"],
        ),
        (
            "iptables: {snatNodeInternalIP: true}",
            &["iptables.snatNodeInternalIP"],
        ),
        (
            "iptables: {localhostNodePorts: false}",
            &["localhostNodePorts", "--nodeport-addresses"],
        ),
        ("mode: nftables", &["mode:", "--nodeport-addresses"]),
        ("mode: kernelspace", &["mode:", "Linux"]),
        ("mode: userspace", &["mode:", "no such mode"]),
        (
            "mode: ipvs\nipvs: {scheduler: sh}",
            &["ipvs.scheduler", "sessionAffinity"],
        ),
        (
            "nodePortAddresses: [primary]",
            &["nodePortAddresses:", "192.0.2.0/24"],
        ),
        (
            "conntrack: {udpTimeout: 10ms}",
            &["conntrack.udpTimeout:", "a second or more"],
        ),
        (
            "conntrack: {udpTimeout: soon}",
            &["conntrack.udpTimeout:", "soon"],
        ),
        (
            "healthzBindAddress: '10256'",
            &["healthzBindAddress:", "with or without a port"],
        ),
        (
            "mode: ipvs\nipvs: {tcpTimeout: 1h}\nconntrack: {tcpEstablishedTimeout: 2h}",
            &[
                "conntrack.tcpEstablishedTimeout",
                "ipvs.tcpTimeout",
                "--timeout-tcp-established",
            ],
        ),
        (
            "windowsRunAsService: true",
            &["windowsRunAsService", "Linux"],
        ),
        (
            "conntrack: {tcpEstablished: 1h}",
            &["conntrack.tcpEstablished:", "no such field"],
        ),
        ("routing: bypass", &["routing:", "no such field"]),
        ("conntrack: 5", &["conntrack: wanted are fields"]),
        ("bindAddress: here", &["bindAddress: wanted is an address"]),
    ] {
        let error = named(&file_of_kube_proxy(fields), &[]).expect_err(fields);
        for word in words {
            assert!(error.contains(word), "{fields}: no {word:?} in {error}");
        }
    }
    for (flags, words) in [
        (
            &["--masquerade-all"][..],
            &["--masquerade-all: remove it"][..],
        ),
        (&["--master", "https://k"], &["--master", "kubeconfig"]),
        (&["--cleanup"], &["--cleanup", "klb cleanup"]),
        (&["--healthz-port=0"], &["--healthz-port", "--healthz-bind"]),
        (
            &["--metrics-bind-address="],
            &["--metrics-bind-address", "127.0.0.1"],
        ),
        (
            &["--proxy-mode=nftables"],
            &["--proxy-mode", "--nodeport-addresses"],
        ),
        (
            &["--metrics-bind-address=::", "--metrics-bind=::"],
            &["--metrics-bind-address and --metrics-bind are the same"],
        ),
        (
            &["--conntrack-udp-timeout=1ms"],
            &["--conntrack-udp-timeout", "a second or more"],
        ),
    ] {
        let error = named("", flags).expect_err("refused");
        for word in words {
            assert!(error.contains(word), "{flags:?}: no {word:?} in {error}");
        }
    }
}

#[test]
fn networks_settle_what_asks_for_them() {
    for fields in ["mode: nftables", "iptables: {localhostNodePorts: false}"] {
        let file = file_of_kube_proxy(fields);
        named(&file, &["--nodeport-addresses=10.0.0.0/8"]).expect("understood");
        let file = format!("{file}\nnodePortAddresses: [10.0.0.0/8]");
        named(&file, &[]).expect("understood");
    }
}

#[test]
fn sections_of_other_modes_are_not_looked_at() {
    let fields = "ipvs: {scheduler: sh, udpTimeout: 5s}\nnftables: {masqueradeAll: true}\n\
        winkernel: {enableDSR: true}\ndetectLocal: {interfaceNamePrefix: tap}\n";
    let args = named(&file_of_kube_proxy(fields), &[]).expect("understood");
    assert_eq!(args.timeouts.timeout_udp_stream, 120);
    assert!(args.devices.pod_device.contains(&"veth*".to_owned()));
    assert_eq!(args.notes, [""; 0]);
}

#[test]
fn nodes_of_ipv6_have_their_probes_there() {
    let file = file_of_kube_proxy("bindAddress: '::'\n");
    let addresses = |args: Result<Box<AgentArgs>, String>| {
        let args = args.expect("understood");
        [args.healthz_bind, args.metrics_bind].map(|addr: SocketAddr| addr.to_string())
    };
    let v6 = ["[::]:10256", "[::1]:10249"];
    assert_eq!(addresses(named(&file, &[])), v6);
    assert_eq!(addresses(named("", &["--bind-address=fd00::1"])), v6);
    let other = ["10.0.0.1:10256", "[::1]:10249"];
    assert_eq!(
        addresses(named(&format!("{file}healthzBindAddress: 10.0.0.1\n"), &[])),
        other
    );
    assert_eq!(
        addresses(named("", &["--bind-address=::", "--healthz-bind=10.0.0.1"])),
        other
    );
    assert_eq!(addresses(named(&file, &["--healthz-bind=10.0.0.1"])), other);
}

#[test]
fn other_commands_have_no_file() {
    let error = parse(["klb", "get", "services", "--config", "f"].map(OsString::from));
    assert_eq!(error.expect_err("refused").exit_code(), 2);
    parse(["klb", "status"].map(OsString::from)).expect("understood");
}

#[test]
fn all_flags_together_are_consistent() {
    command().debug_assert();
    let paths: Vec<_> = kube_proxy::FIELDS.iter().map(|field| field.path).collect();
    for (number, path) in paths.iter().enumerate() {
        assert!(
            path.is_empty() || !paths[..number].contains(path),
            "{path} twice"
        );
    }
}
