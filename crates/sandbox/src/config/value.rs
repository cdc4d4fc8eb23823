//! Values with a grammar of their own.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Less than this no guest kernel boots in.
pub(crate) const MIN_MEMORY: u64 = 96 << 20;

/// Which kind of machine holds a sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// The strongest that works well here.
    #[default]
    Auto,
    /// Hardware virtualisation, or an error: by kapsel-vmm, or by QEMU where that cannot do what is needed.
    Kvm,
    /// Hardware virtualisation by kapsel-vmm, or an error.
    KapselVmm,
    /// Hardware virtualisation by QEMU, or an error.
    QemuKvm,
    /// QEMU's emulation.
    Tcg,
}

impl FromStr for Isolation {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "kapsel-vmm" => Ok(Self::KapselVmm),
            "qemu-kvm" => Ok(Self::QemuKvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err("expected one of auto, kvm, kapsel-vmm, qemu-kvm, tcg".into()),
        }
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::KapselVmm => "kapsel-vmm",
            Self::QemuKvm => "qemu-kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Reads a size: bytes, or a number with one of `k`, `m`, `g`, `t` (powers of 1024; `KiB`, `MB`… mean the same, as in
/// Docker).
///
/// # Errors
/// Says what is accepted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let expected = || format!("expected a size such as 256M, not {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| expected())?;
    let unit = text[digits..].trim_start().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(expected()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than can be counted"))
}

/// Writes a size in the largest unit that needs no fraction.
pub fn format_size(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    units
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("1k", 1024),
            ("256M", 256 << 20),
            ("2 GiB", 2 << 30),
            ("3mb", 3 << 20),
            ("8b", 8),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1x", "1kk", "99999999999T", "ib"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn formatting_loses_nothing() {
        for bytes in [0, 1, 1023, 1024, 1536, 256 << 20, 5 << 40] {
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
    }
}
