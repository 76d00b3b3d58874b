//! A strict reader of the `OpenMetrics` text format (1.0.0): what Prometheus would
//! forgive, it does not.

use std::collections::{BTreeMap, BTreeSet};

/// Values by name and labels, as they are written.
pub type Samples = BTreeMap<String, f64>;

/// One metric with its samples.
#[derive(Debug, Default)]
struct Family {
    name: String,
    kind: Option<String>,
    unit: Option<String>,
    has_help: bool,
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

/// Reads a whole page.
///
/// # Errors
/// A sentence that says what is wrong with which line.
pub fn parse(text: &str) -> Result<Samples, String> {
    let body = text.strip_suffix("# EOF\n").ok_or("no # EOF at the end")?;
    let mut families: Vec<Family> = Vec::new();
    for line in body.lines() {
        take(&mut families, line).map_err(|error| format!("{error}: {line}"))?;
    }
    let names: BTreeSet<_> = families.iter().map(|family| &family.name).collect();
    if names.len() < families.len() {
        return Err("a metric is in two places".to_owned());
    }
    let mut samples = Samples::new();
    for family in &families {
        let name = &family.name;
        check(family).map_err(|error| format!("{name}: {error}"))?;
        for (name, labels, value) in &family.samples {
            let labels: Vec<_> = labels
                .iter()
                .map(|(label, value)| format!("{label}={value:?}"))
                .collect();
            let sample = format!("{name}{{{}}}", labels.join(","));
            if samples.insert(sample.clone(), *value).is_some() {
                return Err(format!("{sample} is there twice"));
            }
        }
    }
    Ok(samples)
}

/// Takes in a line.
fn take(families: &mut Vec<Family>, line: &str) -> Result<(), String> {
    let Some(comment) = line.strip_prefix("# ") else {
        let sample = sample(line)?;
        let family = families.last_mut().ok_or("a sample of nothing")?;
        family.samples.push(sample);
        return Ok(());
    };
    let mut words = comment.splitn(3, ' ');
    let (word, name) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let rest = words.next().ok_or("nothing is said")?.to_owned();
    if !is_name(name) {
        return Err("that is no name".to_owned());
    }
    if families.last().is_none_or(|family| family.name != name) {
        families.push(Family {
            name: name.to_owned(),
            ..Family::default()
        });
    }
    let family = families.last_mut().ok_or("no metric")?;
    if !family.samples.is_empty() {
        return Err("it comes behind the samples".to_owned());
    }
    let is_new = match word {
        "TYPE" => family.kind.replace(rest).is_none(),
        "UNIT" => family.unit.replace(rest).is_none(),
        "HELP" => !std::mem::replace(&mut family.has_help, true),
        _ => return Err("that is no word of the format".to_owned()),
    };
    is_new.then_some(()).ok_or("it is said twice".to_owned())
}

/// `name{label="value"} number`
fn sample(line: &str) -> Result<(String, BTreeMap<String, String>, f64), String> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, behind) = rest.split_once("=\"").ok_or("no label")?;
            let (value, behind) = quoted(behind)?;
            if !is_name(label) || label.contains(':') {
                return Err(format!("{label:?} is no label"));
            }
            if labels.insert(label.to_owned(), value).is_some() {
                return Err(format!("{label} is there twice"));
            }
            rest = match behind.strip_prefix(',') {
                Some(behind) if !behind.starts_with('}') => behind,
                None if behind.starts_with('}') => behind,
                _ => return Err("labels are not separated by commas".to_owned()),
            };
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').ok_or("no space before the value")?;
    let value = value.parse().map_err(|error| format!("{error}"))?;
    if !is_name(name) {
        return Err("that is no name".to_owned());
    }
    Ok((name.to_owned(), labels, value))
}

/// What is in quotes, without escapes, and what is behind.
fn quoted(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((index, letter)) = letters.next() {
        match letter {
            '"' => return Ok((value, &text[index + 1..])),
            '\\' => match letters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                _ => return Err("that is no escape".to_owned()),
            },
            _ => value.push(letter),
        }
    }
    Err("a quote does not end".to_owned())
}

fn is_name(text: &str) -> bool {
    let is_letter = |letter: char| letter.is_ascii_alphabetic() || matches!(letter, '_' | ':');
    let mut letters = text.chars();
    letters.next().is_some_and(is_letter)
        && letters.all(|letter| is_letter(letter) || letter.is_ascii_digit())
}

/// Whether type, unit and samples fit each other.
fn check(family: &Family) -> Result<(), String> {
    let Family {
        name,
        kind,
        unit,
        has_help,
        samples,
    } = family;
    if !has_help {
        return Err("nobody says what it is".to_owned());
    }
    if let Some(unit) = unit
        && !name.ends_with(&format!("_{unit}"))
    {
        return Err(format!("its unit is {unit}"));
    }
    let suffixes: &[&str] = match kind.as_deref() {
        Some("counter") => &["_total", "_created"],
        Some("gauge") => &[""],
        Some("histogram") => &["_bucket", "_count", "_sum", "_created"],
        other => return Err(format!("its type is {other:?}")),
    };
    for (sample, ..) in samples {
        let suffix = sample.strip_prefix(name.as_str());
        if !suffix.is_some_and(|suffix| suffixes.contains(&suffix)) {
            return Err(format!("{sample} is no sample of it"));
        }
    }
    if kind.as_deref() == Some("histogram") {
        return check_buckets(name, samples);
    }
    Ok(())
}

/// The last bucket holds all, and each as many as the one before it.
fn check_buckets(
    name: &str,
    samples: &[(String, BTreeMap<String, String>, f64)],
) -> Result<(), String> {
    let mut last: BTreeMap<BTreeMap<String, String>, (f64, f64)> = BTreeMap::new();
    for (sample, labels, value) in samples {
        let mut labels = labels.clone();
        if *sample == format!("{name}_bucket") {
            let limit = labels.remove("le").ok_or("a bucket without a limit")?;
            let limit: f64 = limit.parse().map_err(|error| format!("{limit}: {error}"))?;
            let before = last.insert(labels, (limit, *value));
            if before.is_some_and(|(least, count)| limit <= least || *value < count) {
                return Err(format!("the bucket up to {limit} holds less"));
            }
        }
    }
    for (sample, labels, value) in samples {
        if *sample == format!("{name}_count") && last.get(labels) != Some(&(f64::INFINITY, *value))
        {
            return Err("the last bucket does not hold all".to_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read() {
        let page = "# HELP a Bytes.\n# TYPE a counter\na_total{x=\"y \\\"z\\\"\",b=\"\"} 3\n\
                    # HELP h_seconds Time.\n# TYPE h_seconds histogram\n# UNIT h_seconds seconds\n\
                    h_seconds_sum 1.5\nh_seconds_count 2\n\
                    h_seconds_bucket{le=\"1.0\"} 1\nh_seconds_bucket{le=\"+Inf\"} 2\n# EOF\n";
        let samples = parse(page).expect("a page");
        let found: Vec<_> = samples
            .iter()
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        assert_eq!(found[0], r#"a_total{b="",x="y \"z\""} 3"#);
        assert!(
            found.contains(&"h_seconds_count{} 2".to_owned()),
            "{found:?}"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let gauge = "# HELP a A.\n# TYPE a gauge\n";
        for (page, error) in [
            ("", "no # EOF"),
            ("a 1\n# EOF\n", "a sample of nothing"),
            ("# TYPE a gauge\na 1\n# EOF\n", "nobody says"),
            (&format!("{gauge}a_total 1\n# EOF\n"), "no sample of it"),
            (&format!("{gauge}a 1\na 2\n# EOF\n"), "twice"),
            (&format!("{gauge}a{{b=\"1\",b=\"2\"}} 1\n# EOF\n"), "twice"),
            (&format!("{gauge}# UNIT a seconds\na 1\n# EOF\n"), "unit"),
            (&format!("{gauge}a 1\n{gauge}# EOF\n"), "behind the samples"),
            (&format!("{gauge}a x\n# EOF\n"), "invalid float"),
        ] {
            let found = parse(page).expect_err(page);
            assert!(found.contains(error), "{found:?} for {page}");
        }
    }
}
