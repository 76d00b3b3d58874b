//! Puts the BPF object into the binary, where there is one.
//!
//! `cargo xtask build` makes the object and then builds this package. Without
//! it the package still builds, with nothing embedded, so that checks and host
//! tests need no BPF toolchain; `klb agent` then says what is missing.

use std::{env, fs, path::PathBuf};

/// The object, or an empty file, in `OUT_DIR`; `src/datapath/load.rs` reads it.
const EMBEDDED: &str = "klb.bpf.o";

fn main() {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));

    println!("cargo::rerun-if-env-changed=KLB_BPF_OBJECT");
    let object = env::var_os("KLB_BPF_OBJECT").map_or_else(
        || {
            let folder = manifest_dir.join("../target/bpf");
            // A path that is absent makes cargo run this script, and compile the
            // package, every time; so the folder is watched, and is there.
            fs::create_dir_all(&folder).expect("creating target/bpf");
            println!("cargo::rerun-if-changed={}", folder.display());
            folder.join("klb.bpf.o")
        },
        |path| {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            path
        },
    );
    let bytes = fs::read(&object).unwrap_or_default();
    fs::write(out_dir.join(EMBEDDED), bytes).expect("writing to OUT_DIR");
}
