//! Which modules have to be loaded, and in which order.

use anyhow::{Result, bail};

/// The paths of `wanted` and of all that they depend on, each after what it
/// depends on. What is built into the kernel is left out.
///
/// `dep` and `builtin` are depmod's files of these names. A line of the first
/// lists all dependencies, also indirect ones, last to load first.
///
/// # Errors
/// If the kernel has no such module.
pub(super) fn in_order<'a>(dep: &'a str, builtin: &str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let mut order = Vec::new();
    for name in wanted {
        if builtin.lines().any(|path| is_module(path, name)) {
            continue;
        }
        let Some((path, dependencies)) = dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| is_module(path, name))
        else {
            bail!("the kernel has no module {name}");
        };
        for path in dependencies.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// Whether `path` is the file of module `name`, compressed or not.
fn is_module(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    // The kernel takes `-` and `_` for the same.
    file.split_once(".ko")
        .is_some_and(|(stem, _)| stem.replace('-', "_") == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/net/sched/cls_bpf.ko.xz:\n\
                       kernel/drivers/net/veth.ko: kernel/net/b.ko kernel/net/a.ko\n\
                       kernel/net/b.ko: kernel/net/a.ko\n\
                       kernel/net/a.ko:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let order = in_order(DEP, "", &["veth", "b", "cls_bpf"]).expect("all are there");
        let expected = [
            "kernel/net/a.ko",
            "kernel/net/b.ko",
            "kernel/drivers/net/veth.ko",
            "kernel/net/sched/cls_bpf.ko.xz",
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn what_is_built_in_is_not_loaded() {
        let order = in_order(
            DEP,
            "kernel/net/sched/sch-ingress.ko\n",
            &["sch_ingress", "a"],
        );
        assert_eq!(order.expect("both are there"), ["kernel/net/a.ko"]);
    }

    #[test]
    fn a_module_that_is_missing_is_named() {
        let error = in_order(DEP, "", &["bridge"]).expect_err("there is none");
        assert_eq!(error.to_string(), "the kernel has no module bridge");
    }
}
