//! How far long operations have come: bars on standard error when that is a terminal, else nothing.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use kapsel_image::{Phase, Progress, ProgressItem};

/// Bars for items that run in parallel. They disappear when all is done.
pub struct Bars(MultiProgress);

impl Bars {
    /// Visible only when standard error is a terminal.
    pub fn new() -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        Bars(MultiProgress::with_draw_target(target))
    }

    /// No bars at all, for `--quiet`.
    pub fn hidden() -> Self {
        Bars(MultiProgress::with_draw_target(ProgressDrawTarget::hidden()))
    }

    /// A bar for `total` bytes, or a spinner where the amount is not known.
    pub fn add(&self, verb: &'static str, label: &str, total: Option<u64>) -> ProgressBar {
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{prefix:<9} {msg:<22!} {wide_bar} {bytes:>11} / {total_bytes:<11} {eta:>4}",
            ),
            None => (ProgressBar::no_length(), "{prefix:<9} {msg:<22!} {spinner} {bytes:>11} {elapsed:>4}"),
        };
        // The templates are constants that the tests render; the default style is no worse than no bar.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        let bar = self.0.add(bar.with_prefix(verb).with_message(label.to_owned()));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

impl Bars {
    /// Shows how far the fetching of a guest kernel is; `bar` is the one of the step before.
    pub fn kernel(&self, bar: &mut Option<ProgressBar>, progress: kapsel_guest::Progress) {
        use kapsel_guest::Progress::{Downloading, Extracting, Waiting};
        match progress {
            Downloading { package, done, total } => {
                let bar =
                    bar.get_or_insert_with(|| self.add("download", &package, Some(total).filter(|t| *t > 0)));
                bar.set_position(done);
            }
            Waiting | Extracting => {
                if let Some(before) = bar.take() {
                    before.finish_and_clear();
                }
                let verb = if progress == Waiting { "wait for" } else { "unpack" };
                *bar = Some(self.add(verb, "guest kernel", None));
            }
        }
    }
}

impl Progress for Bars {
    fn start(&self, phase: Phase, label: &str, total: Option<u64>) -> Box<dyn ProgressItem> {
        let verb = match phase {
            Phase::Download => "download",
            Phase::Import => "import",
            Phase::Unpack => "unpack",
        };
        Box::new(Item(self.add(verb, label, total)))
    }
}

/// One bar, as the image library moves it.
struct Item(ProgressBar);

impl ProgressItem for Item {
    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn done(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Item {
    fn drop(&mut self) {
        // Not done: it failed, and the error message says more than a bar that stands still.
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use indicatif::InMemoryTerm;

    #[test]
    fn bars_show_what_and_how_much_and_then_go() {
        let screen = InMemoryTerm::new(5, 100);
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        let bars = Bars(MultiProgress::with_draw_target(target));
        let mut item = bars.start(Phase::Download, "0123abcd", Some(4096));
        item.advance(1024);
        std::thread::sleep(Duration::from_millis(300));
        let shown = screen.contents();
        assert!(shown.starts_with("download  0123abcd"), "{shown}");
        assert!(shown.contains("1.00 KiB / 4.00 KiB"), "{shown}");
        item.done();
        drop(item);
        assert_eq!(screen.contents(), "");
    }
}
