//! The release build of `klb`, with the BPF object inside.

use anyhow::Result;

use crate::{
    ebpf, paths,
    process::{self, step},
    toolchain,
};

/// Builds the object and then `klb`.
///
/// # Errors
/// If there is no toolchain, or something does not compile.
pub(crate) fn build() -> Result<()> {
    let object = ebpf::build(&toolchain::ready()?)?;
    step("Building klb");
    process::run(process::cargo().args([
        "build",
        "--locked",
        "--release",
        "--package",
        "lb-userspace",
    ]))?;
    step(format_args!(
        "Built {} and {}",
        object.display(),
        paths::klb().display()
    ));
    Ok(())
}
