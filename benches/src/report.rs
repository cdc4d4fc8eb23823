//! Runs contenders in turn and publishes what came out: a table, JSON and a plot.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use plotters::prelude::*;
use serde::Serialize;

/// One thing that is timed: what it is called and how one run of it goes.
pub struct Contender {
    /// The name in tables and plots.
    pub name: String,
    /// Does one run and says how long the part that counts took.
    pub run: Box<dyn FnMut() -> Result<Duration>>,
}

/// The samples of one contender.
#[derive(Serialize)]
struct Row {
    name: String,
    median_ms: f64,
    min_ms: f64,
    max_ms: f64,
    /// This median over the baseline's.
    ratio: Option<f64>,
    /// Content moved in a second, by the median, where content is what is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    megabytes_per_second: Option<f64>,
    samples_ms: Vec<f64>,
}

/// A finished measurement.
#[derive(Serialize)]
pub struct Report {
    name: String,
    title: String,
    baseline: String,
    machine: String,
    rows: Vec<Row>,
}

/// Runs every contender once unmeasured and then `runs` times in turn. What others' programs cannot do on this machine (crun on
/// one with cgroups v1 and v2 mixed) is left out, with the reason.
pub fn measure(
    name: &str,
    title: &str,
    baseline: &str,
    runs: usize,
    contenders: Vec<Contender>,
) -> Result<Report> {
    let mut kept = Vec::with_capacity(contenders.len());
    for mut contender in contenders {
        match (contender.run)() {
            Err(error) if !contender.name.starts_with("kapsel") => {
                eprintln!("{name}: {} is left out: {error:#}", contender.name);
            }
            Err(error) => return Err(error.context(format!("{name}: a run of {} failed", contender.name))),
            Ok(_) => kept.push(contender),
        }
    }
    let mut contenders = kept;
    let mut samples = vec![Vec::with_capacity(runs); contenders.len()];
    for _ in 0..runs {
        for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
            let took =
                (contender.run)().with_context(|| format!("{name}: a run of {} failed", contender.name))?;
            samples.push(took.as_secs_f64() * 1e3);
        }
    }
    let base = contenders.iter().position(|c| c.name == baseline).map(|i| median(&samples[i]));
    let rows = contenders
        .iter()
        .zip(samples)
        .map(|(contender, samples)| Row {
            name: contender.name.clone(),
            median_ms: median(&samples),
            min_ms: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max_ms: samples.iter().copied().fold(0.0, f64::max),
            ratio: base.map(|base| median(&samples) / base),
            megabytes_per_second: None,
            samples_ms: samples,
        })
        .collect();
    Ok(Report { name: name.into(), title: title.into(), baseline: baseline.into(), machine: machine(), rows })
}

/// The middle of the samples; the mean of the two middle ones when their number is even.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// What the figures were measured on, as far as a reader needs it to judge them.
pub fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, m)| m);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {} cpus, Linux {}", cpuinfo.matches("processor\t").count(), kernel.trim())
}

/// Writes any result as `NAME.json`.
pub fn write_json(out: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let path = out.join(format!("{name}.json"));
    std::fs::write(&path, serde_json::to_string_pretty(value)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Report {
    /// Each run moved this many bytes of content: the report also tells how fast.
    pub fn moving(mut self, bytes: u64) -> Self {
        for row in &mut self.rows {
            row.megabytes_per_second = Some(bytes as f64 / 1e3 / row.median_ms);
        }
        self
    }

    /// Prints the table and writes `NAME.json` and `NAME.svg`.
    pub fn publish(&self, out: &Path) -> Result<()> {
        println!("\n{} ({})", self.title, self.machine);
        println!("{:<28} {:>10} {:>10} {:>10} {:>8}", "", "median ms", "min", "max", "ratio");
        for row in &self.rows {
            let ratio = row.ratio.map_or_else(|| "-".into(), |r| format!("{r:.2}"));
            let speed =
                row.megabytes_per_second.map_or_else(String::new, |speed| format!("  {speed:.0} MB/s"));
            println!(
                "{:<28} {:>10.1} {:>10.1} {:>10.1} {:>8}{speed}",
                row.name, row.median_ms, row.min_ms, row.max_ms, ratio
            );
        }
        write_json(out, &self.name, self)?;
        self.plot(&out.join(format!("{}.svg", self.name)))
    }

    /// One horizontal bar a contender, its median at the end.
    fn plot(&self, path: &Path) -> Result<()> {
        const ROW: u32 = 34;
        const LABELS: i32 = 190;
        let height = 60 + ROW * u32::try_from(self.rows.len())?;
        let root = SVGBackend::new(path, (720, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        root.draw(&Text::new(format!("{}, median ms", self.title), (12, 14), text(17)))?;
        let longest = self.rows.iter().map(|r| r.median_ms).fold(1.0, f64::max);
        for (row, y) in self.rows.iter().zip((48..).step_by(ROW as usize)) {
            // A bar is at most 430 pixels wide, so the value's text fits behind it.
            let width = (row.median_ms / longest * 430.0).max(1.0) as i32;
            let colour =
                if row.name.starts_with("kapsel") { RGBColor(46, 116, 181) } else { RGBColor(170, 170, 170) };
            root.draw(&Text::new(row.name.clone(), (12, y + 5), text(15)))?;
            root.draw(&Rectangle::new([(LABELS, y), (LABELS + width, y + 22)], colour.filled()))?;
            root.draw(&Text::new(format!("{:.1}", row.median_ms), (LABELS + width + 8, y + 5), text(15)))?;
        }
        root.present().with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
