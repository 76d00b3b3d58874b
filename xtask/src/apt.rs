//! What the system has to provide, and Debian's packages for it.

pub(crate) mod sources;

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    paths,
    process::{self, step},
};

/// Something that has to be installed.
pub(crate) struct Need {
    /// Debian's package.
    package: &'static str,
    /// The program that shows that it is there, whatever the distribution;
    /// without one only dpkg can tell.
    program: Option<&'static str>,
}

const fn program(package: &'static str, program: &'static str) -> Need {
    Need {
        package,
        program: Some(program),
    }
}

const fn package(package: &'static str) -> Need {
    Need {
        package,
        program: None,
    }
}

/// For the demo and the tests in network namespaces.
pub(crate) const NETWORK: &[Need] = &[
    program("iproute2", "ip"),
    program("ethtool", "ethtool"),
    program("bpftool", "bpftool"),
    program("tcpdump", "tcpdump"),
    program("nftables", "nft"),
    program("iptables", "iptables-save"),
];

/// For the test of the dashboard: a browser without a screen, and a font for it.
pub(crate) const BROWSER: &[Need] = &[
    program("chromium-headless-shell", "chromium-headless-shell"),
    package("fonts-dejavu-core"),
];

/// What kube-proxy programs.
pub(crate) const BENCH: &[Need] = &[
    program("iptables", "iptables-restore"),
    program("nftables", "nft"),
];

/// For the kernel matrix.
pub(crate) const KERNELS: &[Need] = &[
    program("apt", "apt-get"),
    package("busybox-static"),
    package("debian-archive-keyring"),
    program("dpkg", "dpkg-deb"),
    program("kmod", "depmod"),
    package("libc6-dev"),
    program("qemu-system-x86", "qemu-system-x86_64"),
    program("xz-utils", "xz"),
];

/// For the container image.
pub(crate) const IMAGE: &[Need] = &[program("buildah", "buildah"), package("libc6-dev")];

/// A compiler with the source of `core`, and what bpf-linker is built against.
/// The LLVM is the compiler's.
pub(crate) const BPF: &[Need] = &[
    package("rustc-web"),
    package("cargo-web"),
    package("rust-web-src"),
    package("llvm-22-dev"),
    package("zlib1g-dev"),
    package("libzstd-dev"),
    program("gcc", "cc"),
];

impl Need {
    fn is_met(&self) -> bool {
        match self.program {
            Some(program) => process::find(program).is_some(),
            None => is_installed(self.package),
        }
    }
}

/// Installs those of `needs` that are missing.
///
/// # Errors
/// Without root, off Debian, or if apt fails: with the list of what is missing.
pub(crate) fn ensure(needs: &[Need], purpose: &str) -> Result<()> {
    let missing: Vec<_> = needs
        .iter()
        .filter(|need| !need.is_met())
        .map(|need| need.package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let advice =
        format!("missing for {purpose}; as root on Debian:\n    apt-get install --yes {list}");
    if process::find("apt-get").is_none() {
        bail!("this is not Debian, so nothing was installed; {advice}");
    }
    if !process::is_root() {
        bail!("this is not root, so nothing was installed; {advice}");
    }
    step(format_args!("Installing for {purpose}: {list}"));
    install(&missing).context(advice)
}

fn install(packages: &[&str]) -> Result<()> {
    if let Err(error) = process::run(apt_get().args(["-qq", "update"])) {
        // One broken source of many need not matter.
        eprintln!("{error:#}");
    }
    let Err(error) = process::run(install_with(apt_get()).args(packages)) else {
        return Ok(());
    };
    // What is installed may be from backports, and fit nothing else: qemu's
    // packages of one version break those of another.
    eprintln!("{error:#}");
    step("Trying once more, with the suite's backports");
    install_from_backports(packages)
}

fn install_with(mut apt_get: Command) -> Command {
    apt_get
        .args(["-qq", "--yes", "--no-install-recommends"])
        // rustc-web conflicts with Debian's old rustc, which may be in use.
        .arg("--no-remove")
        .arg("install");
    apt_get
}

/// With sources and lists of its own: those of the system stay as they are.
fn install_from_backports(packages: &[&str]) -> Result<()> {
    let suite = sources::codename()?;
    let backports = format!("{suite}-backports");
    let folder = paths::cache()?.join("backports");
    fs::create_dir_all(folder.join("lists/partial"))?;
    let list = folder.join("sources.list");
    let suites = [&*suite, &format!("{suite}-security"), &backports];
    fs::write(&list, sources::list(&suites))?;
    let apt_get = || {
        let mut command = apt_get();
        command
            .args(["-o", "Dir::Etc::sourceparts=/dev/null"])
            .args(["-o", &format!("Dir::Etc::sourcelist={}", list.display())])
            .args([
                "-o",
                &format!("Dir::State::lists={}/lists", folder.display()),
            ])
            // The user `_apt` cannot enter the cache folder of another user.
            .args(["-o", "APT::Sandbox::User=root"]);
        command
    };
    process::run(apt_get().args(["-qq", "update"]))?;
    process::run(
        install_with(apt_get())
            .args(["--target-release", &backports])
            .args(packages),
    )
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "Dpkg::Use-Pty=0"]);
    command
}

fn is_installed(package: &str) -> bool {
    process::text(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]))
        .is_ok_and(|status| status == "installed")
}
