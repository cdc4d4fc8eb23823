//! What the programs for measuring share: medians, tables and plots.

pub mod report;
