//! What was measured.

use std::collections::BTreeMap;

use kapsel_benches::report::median;
use serde::{Deserialize, Serialize};

/// Begins the line with the results.
pub const RESULTS: &str = "RESULTS ";
/// The monitor that is measured.
pub const KAPSEL: &str = "kapsel-vmm";
/// The one that it is compared with.
pub const FIRECRACKER: &str = "firecracker";

/// One quantity, by monitor.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measure {
    name: String,
    unit: String,
    /// The median of [`KAPSEL`] over that of [`FIRECRACKER`].
    ratio: Option<f64>,
    medians: BTreeMap<String, f64>,
    samples: BTreeMap<String, Vec<f64>>,
}

/// All quantities, in the order in which they were first measured.
#[derive(Debug, Default)]
pub struct Measures(Vec<Measure>);

impl Measures {
    /// One more sample.
    pub fn add(&mut self, monitor: &str, name: &str, unit: &str, sample: f64) {
        if !self.0.iter().any(|measure| measure.name == name) {
            self.0.push(Measure {
                name: name.to_owned(),
                unit: unit.to_owned(),
                ratio: None,
                medians: BTreeMap::new(),
                samples: BTreeMap::new(),
            });
        }
        if let Some(measure) = self.0.iter_mut().find(|measure| measure.name == name) {
            measure.samples.entry(monitor.to_owned()).or_default().push(sample);
        }
    }

    /// With medians and ratios.
    pub fn finish(mut self) -> Vec<Measure> {
        for measure in &mut self.0 {
            let medians = measure.samples.iter().map(|(monitor, samples)| (monitor.clone(), median(samples)));
            measure.medians = medians.collect();
            measure.ratio = Some(measure.medians[KAPSEL])
                .zip(measure.medians.get(FIRECRACKER))
                .map(|(ours, theirs)| ours / theirs);
        }
        self.0
    }
}

/// A table for people.
pub fn print(measures: &[Measure]) {
    println!("\n{:<44} {:>12} {:>12} {:>7}", "median", KAPSEL, FIRECRACKER, "ratio");
    for measure in measures {
        let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.2}"));
        let of = |monitor: &str| number(measure.medians.get(monitor).copied());
        let name = format!("{} ({})", measure.name, measure.unit);
        println!("{name:<44} {:>12} {:>12} {:>7}", of(KAPSEL), of(FIRECRACKER), number(measure.ratio));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians_and_only_where_there_are_two() {
        let mut measures = Measures::default();
        for (monitor, sample) in [(KAPSEL, 1.0), (FIRECRACKER, 4.0), (KAPSEL, 3.0), (KAPSEL, 2.0)] {
            measures.add(monitor, "time", "ms", sample);
        }
        measures.add(KAPSEL, "size", "MB", 2.0);
        let [time, size] = &measures.finish()[..] else { panic!("two quantities were measured") };
        assert_eq!((time.ratio, size.ratio), (Some(0.5), None));
        assert_eq!((time.samples[KAPSEL].len(), size.medians[KAPSEL]), (3, 2.0));
    }
}
