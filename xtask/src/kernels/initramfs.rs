//! The root file system of a machine: a `cpio` archive in the format that
//! Linux calls "newc".

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{Contents, image::Image, libraries};
use crate::process;

/// What the machine's first process writes before the exit status of the tests.
pub(super) const MARKER: &str = "klb-exit-status:";

/// The mode of a folder, and of a file that can be run.
const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_755;

/// What the tests run, beside klb.
const TOOLS: [&str; 2] = ["ip", "ethtool"];

/// The archive for `image`.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn build(image: &Image, contents: &Contents) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "tmp", "run"] {
        archive.add_folder(Path::new(folder));
    }
    archive.add_file("bin/busybox", &find("busybox")?)?;
    let Contents { tests, object, klb } = contents;
    archive.add_file("packet", &tests.packet)?;
    archive.add_file("netns", &tests.netns)?;
    archive.add_file("klb-traffic", &tests.helper)?;
    archive.add_file("klb.bpf.o", object)?;
    archive.add_file("klb", klb)?;
    let tools = TOOLS.map(find).into_iter().collect::<Result<Vec<_>>>()?;
    for (name, file) in TOOLS.iter().zip(&tools) {
        archive.add_file(&format!("sbin/{name}"), file)?;
    }
    let programs = tools.iter().map(PathBuf::as_path).chain([klb.as_path()]);
    for library in libraries::of(programs)? {
        let name = library.to_string_lossy();
        archive.add_file(name.trim_start_matches('/'), &library)?;
    }
    let modules = image.modules()?;
    for (name, content) in &modules {
        archive.add(&format!("modules/{name}"), content);
    }
    let names = modules.iter().map(|(name, _)| name.as_str());
    archive.add("init", init(names).as_bytes());
    Ok(archive.finish())
}

fn find(program: &str) -> Result<PathBuf> {
    process::find(program).with_context(|| format!("there is no {program}"))
}

/// The machine's first process. It powers the machine off itself: were it to
/// end, the kernel would panic.
fn init<'a>(modules: impl Iterator<Item = &'a str>) -> String {
    let load: String = modules
        .flat_map(|name| ["insmod /modules/", name, "\n"])
        .collect();
    format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/sbin:/bin\n\
         mount -t devtmpfs dev /dev\n\
         exec </dev/null >/dev/ttyS0 2>&1\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mount -t cgroup2 cgroup /sys/fs/cgroup\n\
         mount -t tmpfs tmp /tmp\n\
         mount -t tmpfs run /run\n\
         ulimit -l unlimited\n\
         ip link set lo up\n\
         {load}\
         export RUST_BACKTRACE=1 KLB_TEST_START_SECONDS=240\n\
         KLB_BPF_OBJECT=/klb.bpf.o /packet --test-threads=1\n\
         packet=$?\n\
         KLB_BIN=/klb KLB_TRAFFIC=/klb-traffic /netns --test-threads=1 kernels\n\
         netns=$?\n\
         echo \"{MARKER} $((packet | netns))\"\n\
         poweroff -f\n"
    )
}

/// A `cpio` archive being written.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<PathBuf>,
}

impl Archive {
    /// Adds a file that can be run, with the content of another.
    fn add_file(&mut self, name: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.add(name, &content);
        Ok(())
    }

    /// Adds a file that can be run, and the folders that it is in.
    fn add(&mut self, name: &str, content: &[u8]) {
        if let Some(folder) = Path::new(name).parent() {
            self.add_folder(folder);
        }
        self.entry(name, FILE, content);
    }

    /// Adds a folder and those that it is in, unless they are there.
    fn add_folder(&mut self, folder: &Path) {
        let Some(parent) = folder.parent() else {
            return;
        };
        self.add_folder(parent);
        if self.folders.insert(folder.to_owned()) {
            self.entry(&folder.to_string_lossy(), FOLDER, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        // Files of the same number would be hard links.
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("files below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("short names");
        let header = [
            self.entries,
            mode,
            0, // user
            0, // group
            1, // links
            0, // time
            size,
            0, // device, major and minor
            0,
            0, // device of a device file, major and minor
            0,
            name_size,
            0, // checksum, which this format does not use
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_a_name_and_content_each_padded_to_four() {
        let mut archive = Archive::default();
        archive.add("ab", b"hello");
        let header = [
            "070701", "00000001", "000081ed", "00000000", "00000000", "00000001", "00000000",
            "00000005", "00000000", "00000000", "00000000", "00000000", "00000003", "00000000",
        ];
        let expected = header.concat() + "ab\0\0\0\0hello\0\0\0";
        assert_eq!(archive.bytes, expected.as_bytes());
    }

    #[test]
    fn folders_come_once_and_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.add("a/b/c", b"");
        archive.add("a/b/d", b"");
        let text = String::from_utf8(archive.finish()).expect("ASCII");
        let names: Vec<_> = text
            .split("070701")
            .skip(1)
            .map(|entry| entry[104..].trim_end_matches('\0'))
            .collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d", "TRAILER!!!"]);
    }
}
