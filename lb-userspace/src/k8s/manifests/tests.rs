use std::os::unix::fs::symlink;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::model::{Kind, NamespacedName};

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

/// A folder in memory: a disk that is busy may halt a writer for longer than a
/// file is believed to be in the middle of being written.
fn temporary() -> TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() {
        TempDir::new_in(memory)
    } else {
        TempDir::new()
    };
    dir.expect("a temporary folder")
}

/// A folder that is watched.
struct Fixture {
    dir: TempDir,
    source: ManifestSource,
}

impl Fixture {
    /// With these files, and everything they say already told.
    async fn new(files: &[(&str, &str)]) -> (Self, Vec<Event>) {
        let dir = temporary();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        let source = ManifestSource::open(dir.path()).expect("a folder to watch");
        let mut fixture = Self { dir, source };
        let mut events = fixture.next().await;
        let synced = events.split_off(events.len() - 2);
        assert_eq!(synced, [Scope::Services, Scope::Pods].map(Event::Synced));
        (fixture, events)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a file");
    }

    async fn next(&mut self) -> Vec<Event> {
        timeout(Duration::from_secs(10), self.source.next())
            .await
            .expect("the change is noticed")
    }

    /// The next changes, as `+name ip` and `-name`.
    async fn changes(&mut self) -> Vec<String> {
        describe(&self.next().await)
    }

    /// Nothing is told for a change that says nothing: a later one is the next.
    async fn expect_only(&mut self, probe: &str) {
        self.write("zz-probe.yaml", &service(probe, "10.96.99.99"));
        assert_eq!(self.changes().await, [format!("+{probe} 10.96.99.99")]);
        fs::remove_file(self.path("zz-probe.yaml")).expect("the probe");
        assert_eq!(self.changes().await, [format!("-{probe}")]);
    }
}

fn describe(events: &[Event]) -> Vec<String> {
    let describe = |event: &Event| match event {
        Event::Apply(Object::Service(service)) => {
            format!("+{} {}", service.id.name(), service.cluster_ips[0])
        }
        Event::Delete(object) => format!("-{}", object.id.name()),
        other => format!("{other:?}"),
    };
    events.iter().map(describe).collect()
}

#[tokio::test]
async fn the_first_batch_is_everything_and_says_so() {
    let two = service("a", "10.96.0.1") + "---\n" + &service("b", "10.96.0.2");
    let (_fixture, events) = Fixture::new(&[
        ("two.yaml", &two),
        (
            "one.json",
            r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}}"#,
        ),
        ("three.yml", &service("c", "10.96.0.3")),
        (".hidden.yaml", &service("d", "10.96.0.4")),
        ("notes.txt", "not a manifest"),
    ])
    .await;
    let mut told = describe(&events);
    told.sort();
    assert_eq!(told.len(), 4);
    assert_eq!(told[..3], ["+a 10.96.0.1", "+b 10.96.0.2", "+c 10.96.0.3"]);
}

#[tokio::test]
async fn files_are_added_changed_replaced_and_removed() {
    let (mut fixture, _) = Fixture::new(&[]).await;
    fixture.write("a.yaml", &service("a", "10.96.0.1"));
    assert_eq!(fixture.changes().await, ["+a 10.96.0.1"]);
    fixture.write("a.yaml", &service("a", "10.96.0.2"));
    assert_eq!(fixture.changes().await, ["+a 10.96.0.2"]);
    fixture.write("a.yaml.new", &service("a", "10.96.0.3"));
    fs::rename(fixture.path("a.yaml.new"), fixture.path("a.yaml")).expect("renamed");
    assert_eq!(fixture.changes().await, ["+a 10.96.0.3"]);
    fs::rename(fixture.path("a.yaml"), fixture.path("b.yaml")).expect("renamed");
    fixture.expect_only("renaming-changes-nothing").await;
    fs::remove_file(fixture.path("b.yaml")).expect("removed");
    assert_eq!(fixture.changes().await, ["-a"]);
}

#[tokio::test]
async fn an_unchanged_file_tells_nothing() {
    let text = service("a", "10.96.0.1");
    let (mut fixture, _) = Fixture::new(&[("a.yaml", &text)]).await;
    fixture.write("a.yaml", &(text + "# a comment\n"));
    fixture.expect_only("probe").await;
}

#[tokio::test]
async fn a_broken_document_leaves_what_it_described_and_the_others_go_on() {
    let text = |first: &str, ip: &str| first.to_owned() + "---\n" + &service("b", ip);
    let good = service("a", "10.96.0.1");
    let (mut fixture, _) = Fixture::new(&[("f.yaml", &text(&good, "10.96.0.2"))]).await;
    // It says who it is.
    let wrong = good.replace("port: 80", "port: 0");
    fixture.write("f.yaml", &text(&wrong, "10.96.0.3"));
    assert_eq!(fixture.changes().await, ["+b 10.96.0.3"]);
    // It does not.
    fixture.write("f.yaml", &text("{ no yaml\n", "10.96.0.4"));
    assert_eq!(fixture.changes().await, ["+b 10.96.0.4"]);
    // Mended.
    fixture.write("f.yaml", &text(&service("a", "10.96.0.9"), "10.96.0.4"));
    assert_eq!(fixture.changes().await, ["+a 10.96.0.9"]);
}

#[tokio::test]
async fn a_broken_document_that_was_never_good_describes_nothing() {
    let broken = service("b", "10.96.0.1").replace("port: 80", "port: 0");
    let (mut fixture, events) =
        Fixture::new(&[("a.yaml", "kind: Service\n"), ("b.yaml", &broken)]).await;
    // But it may have described something to an earlier run of the agent.
    let b = Concern::Service(NamespacedName::new("default", "b"));
    let unknown = Event::Unknown(BTreeSet::from([Concern::Anyone, b.clone()]));
    assert_eq!(events, [unknown]);
    fixture.write("a.yaml", &service("a", "10.96.0.1"));
    let events = fixture.next().await;
    assert_eq!(describe(&events[..1]), ["+a 10.96.0.1"]);
    assert_eq!(events[1..], [Event::Unknown(BTreeSet::from([b]))]);
}

#[tokio::test]
async fn the_first_of_two_descriptions_counts() {
    let (mut fixture, events) = Fixture::new(&[
        ("1.yaml", &service("a", "10.96.0.1")),
        ("2.yaml", &service("a", "10.96.0.2")),
    ])
    .await;
    assert_eq!(describe(&events), ["+a 10.96.0.1"]);
    fs::remove_file(fixture.path("1.yaml")).expect("removed");
    assert_eq!(fixture.changes().await, ["+a 10.96.0.2"]);
}

#[tokio::test]
async fn a_config_map_is_swapped_as_a_whole() {
    let dir = TempDir::new().expect("a temporary folder");
    let version = |n: u8, text: &str| {
        let folder = dir.path().join(format!("..v{n}"));
        fs::create_dir(&folder).expect("a folder");
        fs::write(folder.join("a.yaml"), text).expect("a file");
    };
    version(1, &service("a", "10.96.0.1"));
    version(2, &service("a", "10.96.0.2"));
    let data = dir.path().join("..data");
    symlink("..v1", &data).expect("a link");
    symlink("..data/a.yaml", dir.path().join("a.yaml")).expect("a link");
    let mut source = ManifestSource::open(dir.path()).expect("a folder to watch");
    assert_eq!(describe(&source.next().await)[0], "+a 10.96.0.1");
    let next = dir.path().join("..data_tmp");
    symlink("..v2", &next).expect("a link");
    fs::rename(next, data).expect("the swap");
    let events = timeout(Duration::from_secs(10), source.next()).await;
    assert_eq!(describe(&events.expect("noticed")), ["+a 10.96.0.2"]);
}

#[tokio::test]
async fn a_folder_that_vanishes_changes_nothing_until_it_is_back() {
    let parent = TempDir::new().expect("a temporary folder");
    let folder = parent.path().join("manifests");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("a.yaml"), service("a", "10.96.0.1")).expect("a file");
    let mut source = ManifestSource::open(&folder).expect("a folder to watch");
    source.next().await;
    fs::rename(&folder, parent.path().join("away")).expect("renamed");
    let next = parent.path().join("next");
    fs::create_dir(&next).expect("a folder");
    fs::write(next.join("b.yaml"), service("b", "10.96.0.2")).expect("a file");
    fs::rename(&next, &folder).expect("renamed");
    let events = timeout(Duration::from_secs(10), source.next()).await;
    assert_eq!(describe(&events.expect("noticed")), ["-a", "+b 10.96.0.2"]);
}

#[tokio::test]
async fn a_file_that_is_being_written_is_left_alone() {
    let (mut fixture, _) = Fixture::new(&[("a.yaml", &service("a", "10.96.0.1"))]).await;
    let mut file = fs::File::create(fixture.path("a.yaml")).expect("truncated");
    io::Write::write_all(&mut file, b"# half of it\n").expect("written");
    // Something else makes the folder be read meanwhile.
    fixture.expect_only("probe").await;
    io::Write::write_all(&mut file, service("a", "10.96.0.7").as_bytes()).expect("written");
    drop(file);
    assert_eq!(fixture.changes().await, ["+a 10.96.0.7"]);
}

#[tokio::test]
async fn a_broken_document_in_front_does_not_outrank_a_good_one() {
    let (mut fixture, _) = Fixture::new(&[("a.yaml", &service("a", "10.96.0.1"))]).await;
    let text = "{broken\n---\n".to_owned() + &service("a", "10.96.0.2");
    fixture.write("a.yaml", &text);
    assert_eq!(fixture.changes().await, ["+a 10.96.0.2"]);
}

#[tokio::test]
async fn a_file_that_is_no_yaml_any_more_loses_nothing() {
    let text = service("a", "10.96.0.1") + "---\n" + &service("b", "10.96.0.2");
    let (mut fixture, _) = Fixture::new(&[("f.yaml", &text)]).await;
    fixture.write("f.yaml", "kind: [Service\n");
    fixture.expect_only("probe").await;
    fixture.write("f.yaml", &service("b", "10.96.0.2"));
    assert_eq!(fixture.changes().await, ["-a"]);
}

/// Writing in place cuts the file first. A reader must not take that for the
/// end of what it described.
#[tokio::test(flavor = "multi_thread")]
async fn overwriting_in_place_deletes_nothing() {
    let text = service("a", "10.96.0.1");
    let (mut fixture, _) = Fixture::new(&[("a.yaml", &text)]).await;
    let path = fixture.path("a.yaml");
    let writer = std::thread::spawn(move || {
        for n in 0..2000 {
            fs::write(&path, format!("{text}# {n}\n")).expect("a file");
        }
        fs::write(&path, service("a", "10.96.0.2")).expect("a file");
    });
    assert_eq!(fixture.changes().await, ["+a 10.96.0.2"]);
    writer.join().expect("written");
}

#[tokio::test]
async fn a_link_to_a_folder_may_point_elsewhere() {
    let parent = TempDir::new().expect("a temporary folder");
    for (n, ip) in [("one", "10.96.0.1"), ("two", "10.96.0.2")] {
        fs::create_dir(parent.path().join(n)).expect("a folder");
        fs::write(parent.path().join(n).join("a.yaml"), service("a", ip)).expect("a file");
    }
    let link = parent.path().join("link");
    symlink("one", &link).expect("a link");
    let mut source = ManifestSource::open(&link).expect("a folder to watch");
    assert_eq!(describe(&source.next().await)[0], "+a 10.96.0.1");
    symlink("two", parent.path().join("next")).expect("a link");
    fs::rename(parent.path().join("next"), &link).expect("renamed");
    let events = timeout(Duration::from_secs(10), source.next()).await;
    assert_eq!(describe(&events.expect("noticed")), ["+a 10.96.0.2"]);
}

#[test]
fn what_is_no_folder_is_refused() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    assert!(ManifestSource::open(file.path()).is_err());
    assert!(ManifestSource::open(Path::new("/no/such/folder")).is_err());
}

#[test]
fn references_read_like_kubectls() {
    let reference = |kind, namespace| ObjectRef {
        kind,
        id: NamespacedName::new(namespace, "n"),
    };
    assert_eq!(reference(Kind::Service, "d").to_string(), "Service d/n");
    assert_eq!(reference(Kind::Node, "").to_string(), "Node n");
}
