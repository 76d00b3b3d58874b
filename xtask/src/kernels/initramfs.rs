//! The root file system of a machine: a `cpio` archive in the format that
//! Linux calls "newc".

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::image::Image;
use crate::process;

/// What the machine's first process writes before the exit status of the tests.
pub(super) const MARKER: &str = "klb-exit-status:";

/// The mode of a folder, and of a file that can be run.
const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_755;

/// The archive for `image`, with the test program `tests` and the BPF `object`.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn build(image: &Image, tests: &Path, object: &Path) -> Result<Vec<u8>> {
    let busybox = process::find("busybox").context("there is no busybox")?;
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
        archive.add(folder, FOLDER, &[]);
    }
    archive.add("bin/busybox", FILE, &read(&busybox)?);
    archive.add("tests", FILE, &read(tests)?);
    archive.add("klb.bpf.o", FILE, &read(object)?);
    let modules = image.modules()?;
    for (name, content) in &modules {
        archive.add(&format!("modules/{name}"), FILE, content);
    }
    let names = modules.iter().map(|(name, _)| name.as_str());
    archive.add("init", FILE, init(names).as_bytes());
    Ok(archive.finish())
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
         export PATH=/bin\n\
         mount -t devtmpfs dev /dev\n\
         exec </dev/null >/dev/ttyS0 2>&1\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mount -t cgroup2 cgroup /sys/fs/cgroup\n\
         mount -t tmpfs tmp /tmp\n\
         ulimit -l unlimited\n\
         ip link set lo up\n\
         {load}\
         KLB_BPF_OBJECT=/klb.bpf.o RUST_BACKTRACE=1 /tests --test-threads=1\n\
         echo \"{MARKER} $?\"\n\
         poweroff -f\n"
    )
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// A `cpio` archive being written.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
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
        self.add("TRAILER!!!", 0, &[]);
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
        archive.add("ab", FILE, b"hello");
        let header = [
            "070701", "00000001", "000081ed", "00000000", "00000000", "00000001", "00000000",
            "00000005", "00000000", "00000000", "00000000", "00000000", "00000003", "00000000",
        ];
        let expected = header.concat() + "ab\0\0\0\0hello\0\0\0";
        assert_eq!(archive.bytes, expected.as_bytes());
    }
}
