//! What is said about a number of measurements.

/// The middle of a number of values, and how far the half around it spreads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Quartiles {
    pub(super) p25: f64,
    pub(super) median: f64,
    pub(super) p75: f64,
}

impl Quartiles {
    /// # Panics
    /// If there is no value.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self {
            p25: quantile(&values, 25),
            median: quantile(&values, 50),
            p75: quantile(&values, 75),
        }
    }
}

/// The value that `percent` of 100 values in rising order do not exceed; between
/// two values, the part of the way that is due.
///
/// # Panics
/// If there is no value.
pub(super) fn quantile(sorted: &[f64], percent: usize) -> f64 {
    assert!(!sorted.is_empty(), "nothing was measured");
    let steps = (sorted.len() - 1) * percent;
    let (below, rest) = (steps / 100, steps % 100);
    let low = sorted[below];
    let high = sorted[(below + 1).min(sorted.len() - 1)];
    let part = f64::from(u32::try_from(rest).expect("below 100")) / 100.0;
    low + (high - low) * part
}

/// The middle value.
///
/// # Panics
/// If there is no value.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Quartiles::of(values).median
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_values() {
        let expected = Quartiles {
            p25: 1.75,
            median: 2.5,
            p75: 3.25,
        };
        assert_eq!(Quartiles::of([4.0, 1.0, 3.0, 2.0]), expected);
    }

    #[test]
    fn one_value_is_all_of_them() {
        let expected = Quartiles {
            p25: 7.0,
            median: 7.0,
            p75: 7.0,
        };
        assert_eq!(Quartiles::of([7.0]), expected);
    }
}
