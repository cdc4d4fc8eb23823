//! CPU templates: changes to what the guest's processors are and say about themselves, in Firecracker's JSON.
//!
//! A template changes what KVM supports before a machine's own changes ([`cpuid`](super::cpuid)) are made, and
//! model-specific registers before the values that every machine starts with are set.

use std::borrow::Cow;
use std::io::Read;
use std::path::PathBuf;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// The largest file with a template, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Why a template cannot be used. The texts are Firecracker's where it has the same, because clients look at them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that it is in.
    #[error("cannot read the CPU template {path}: {reason}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A leaf that KVM does not have.
    #[error("Template changes a CPUID entry not supported by KVM: Leaf: {0:0x}, Subleaf: {1:0x}")]
    Leaf(u32, u32),
    /// A register that KVM does not have, or a value that it does not take.
    #[error("Template changes an MSR entry not supported by KVM: Register Address: {0:0x}")]
    Msr(u32),
    /// KVM refused.
    #[error("KVM did not {0} a processor's registers for the CPU template: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
}

/// A template, or where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Source {
    /// In a file.
    File(PathBuf),
    /// Here.
    Inline(Template),
}

impl Source {
    /// The template.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn template(&self) -> Result<Cow<'_, Template>, Error> {
        let path = match self {
            Source::Inline(template) => return Ok(Cow::Borrowed(template)),
            Source::File(path) => path,
        };
        let failed = |reason: String| Error::File { path: path.clone(), reason };
        let mut json = Vec::new();
        let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
        file.take(FILE_MAX).read_to_end(&mut json).map_err(|e| failed(e.to_string()))?;
        Ok(Cow::Owned(serde_json::from_slice(&json).map_err(|e| failed(e.to_string()))?))
    }
}

/// Changes to all processors of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What KVM has to be able to do, beside or in spite of what every machine needs.
    #[serde(default)]
    pub kvm_capabilities: Vec<Capability>,
    /// What processors say about themselves.
    #[serde(default)]
    pub cpuid_modifiers: Vec<LeafModifier>,
    /// Model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes to a leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafModifier {
    leaf: Number,
    subleaf: Number,
    /// How KVM looks the leaf up (`KVM_CPUID_FLAG_*`).
    flags: u32,
    modifiers: Vec<RegisterModifier>,
}

/// A change to one of a leaf's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RegisterModifier {
    register: Register,
    bitmap: Bits<32>,
}

/// A change to a model-specific register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrModifier {
    addr: Number,
    bitmap: Bits<64>,
}

impl Template {
    /// Makes the changes to what KVM supports.
    ///
    /// # Errors
    /// [`Error::Leaf`].
    pub fn change(&self, supported: &mut CpuId) -> Result<(), Error> {
        for LeafModifier { leaf, subleaf, flags, modifiers } in &self.cpuid_modifiers {
            let mut entries = supported.as_mut_slice().iter_mut();
            let entry = entries.find(|entry| (entry.function, entry.index) == (leaf.0, subleaf.0));
            let entry = entry.ok_or(Error::Leaf(leaf.0, subleaf.0))?;
            entry.flags = *flags;
            for RegisterModifier { register, bitmap } in modifiers {
                let value = match register {
                    Register::Eax => &mut entry.eax,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                *value = bitmap.apply(u64::from(*value)) as u32;
            }
        }
        Ok(())
    }

    /// Makes the changes to a processor's model-specific registers.
    ///
    /// # Errors
    /// [`Error::Msr`] or [`Error::Kvm`].
    pub fn change_msrs(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        for MsrModifier { addr: Number(index), bitmap } in &self.msr_modifiers {
            let mut entry = kvm_msr_entry { index: *index, ..Default::default() };
            let list = |entry| Msrs::from_entries(&[entry]).map_err(|_| Error::Msr(*index));
            let mut read = list(entry)?;
            let count = vcpu.get_msrs(&mut read).map_err(|e| Error::Kvm("read", e))?;
            entry.data = bitmap.apply(read.as_slice()[0].data);
            if count == 0 || vcpu.set_msrs(&list(entry)?).map_err(|e| Error::Kvm("set", e))? == 0 {
                return Err(Error::Msr(*index));
            }
        }
        Ok(())
    }

    /// The numbers of the model-specific registers that it changes.
    pub fn msrs(&self) -> impl Iterator<Item = u32> {
        self.msr_modifiers.iter().map(|modifier| modifier.addr.0)
    }

    /// Whether this capability of KVM (`KVM_CAP_*`) is looked for, if every machine needs it or not as `usual` says.
    pub fn needs(&self, number: u32, usual: bool) -> bool {
        let named = self.kvm_capabilities.iter().rev().find(|capability| capability.number == number);
        named.map_or(usual, |capability| capability.wanted)
    }
}

/// A capability of KVM: `"121"` has to be there, `"!121"` need not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Capability {
    /// Its number.
    pub number: u32,
    wanted: bool,
}

impl TryFrom<String> for Capability {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (number, wanted) = text.strip_prefix('!').map_or((text.as_str(), true), |rest| (rest, false));
        let number = number.parse().map_err(|error| {
            format!(
                "Failed to parse string [{text}] as a kvm capability - can not convert to numeric: {error}"
            )
        })?;
        Ok(Capability { number, wanted })
    }
}

impl From<Capability> for String {
    fn from(Capability { number, wanted }: Capability) -> String {
        if wanted { number.to_string() } else { format!("!{number}") }
    }
}

/// A number as a string, in hexadecimal or binary digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Number(u32);

impl TryFrom<String> for Number {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (digits, radix) = match (text.strip_prefix("0b"), text.strip_prefix("0x")) {
            (Some(digits), _) => (digits, 2),
            (_, Some(digits)) => (digits, 16),
            _ => {
                return Err(format!(
                    "No supported number system prefix found in value [{text}]. Make sure to prefix the number with '0x' \
                     for hexadecimal numbers or '0b' for binary numbers."
                ));
            }
        };
        u32::from_str_radix(digits, radix).map(Number).map_err(|error| {
            format!("Failed to parse string [{text}] as a number for CPU template - {error:?}")
        })
    }
}

impl From<Number> for String {
    fn from(Number(number): Number) -> String {
        format!("{number:#x}")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl TryFrom<String> for Register {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        Ok(match text.as_str() {
            "eax" => Register::Eax,
            "ebx" => Register::Ebx,
            "ecx" => Register::Ecx,
            "edx" => Register::Edx,
            _ => return Err("Invalid CPUID register. Must be one of [eax, ebx, ecx, edx]"),
        })
    }
}

/// What becomes of a register's bits: `0`, `1`, or `x` for what they are, the highest one first. Missing ones stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Bits<const WIDTH: u32> {
    filter: u64,
    value: u64,
}

impl<const WIDTH: u32> Bits<WIDTH> {
    fn apply(&self, to: u64) -> u64 {
        to & !self.filter | self.value
    }
}

impl<const WIDTH: u32> TryFrom<String> for Bits<WIDTH> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let failed = |why: &str| format!("Failed to parse string [{text}] as a bitmap - {why}");
        let mut bits = Bits { filter: 0, value: 0 };
        let digits = text.strip_prefix("0b").unwrap_or(&text).chars().rev().filter(|digit| *digit != '_');
        for (position, digit) in digits.enumerate() {
            if position >= WIDTH as usize {
                return Err(failed("string is too long"));
            }
            let bit = 1 << position;
            match digit {
                'x' => {}
                '0' => bits.filter |= bit,
                '1' => (bits.filter, bits.value) = (bits.filter | bit, bits.value | bit),
                other => return Err(failed(&format!("unknown character: {other}"))),
            }
        }
        Ok(bits)
    }
}

impl<const WIDTH: u32> From<Bits<WIDTH>> for String {
    fn from(bits: Bits<WIDTH>) -> String {
        let digit = |position: u32| match (bits.filter >> position & 1, bits.value >> position & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        "0b".chars().chain((0..WIDTH).rev().map(digit)).collect()
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    const TEMPLATE: &str = r#"{
        "kvm_capabilities": ["!56", "121"],
        "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0b0", "flags": 1,
            "modifiers": [{"register": "ebx", "bitmap": "0b1_0xx"}, {"register": "edx", "bitmap": "x1"}]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1x"}]
    }"#;

    #[test]
    fn bits_are_set_cleared_and_left_as_the_template_says() {
        let template: Template = serde_json::from_str(TEMPLATE).unwrap();
        let entry = kvm_cpuid_entry2 { function: 7, ebx: 0b0111, edx: 0b1000, eax: 5, ..Default::default() };
        let other = kvm_cpuid_entry2 { function: 7, index: 1, ebx: 0b0111, ..Default::default() };
        let mut supported = CpuId::from_entries(&[other, entry]).unwrap();
        template.change(&mut supported).unwrap();
        let [other, changed] = supported.as_slice() else { panic!("there are two entries") };
        assert_eq!((other.ebx, other.flags), (0b0111, 0));
        assert_eq!((changed.eax, changed.ebx, changed.edx, changed.flags), (5, 0b1011, 0b1001, 1));
        assert_eq!(template.msrs().collect::<Vec<_>>(), [0x10a]);
        assert!(template.needs(121, false) && !template.needs(56, true));
        assert!(template.needs(1, true) && !template.needs(1, false));
        let missing = template.change(&mut CpuId::from_entries(&[other.to_owned()]).unwrap()).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "Template changes a CPUID entry not supported by KVM: Leaf: 7, Subleaf: 0"
        );
    }

    #[test]
    fn what_is_read_is_written_alike() {
        let template: Template = serde_json::from_str(TEMPLATE).unwrap();
        let text = serde_json::to_string(&template).unwrap();
        assert!(text.contains(r#""leaf":"0x7""#) && text.contains(r#""register":"ebx""#), "{text}");
        assert_eq!(serde_json::from_str::<Template>(&text).unwrap(), template);
        assert_eq!(serde_json::from_str::<Template>("{}").unwrap(), Template::default());
    }

    #[test]
    fn what_is_no_template_is_refused_in_firecrackers_words() {
        let leaf = |leaf: &str, register: &str, bitmap: &str| {
            let register = format!(r#"{{"register": "{register}", "bitmap": "{bitmap}"}}"#);
            format!(
                r#"{{"cpuid_modifiers": [{{"leaf": "{leaf}", "subleaf": "0x0", "flags": 0, "modifiers": [{register}]}}]}}"#
            )
        };
        for (json, message) in [
            (leaf("7", "eax", "1"), "No supported number system prefix found in value [7]"),
            (leaf("0xg", "eax", "1"), "Failed to parse string [0xg] as a number for CPU template"),
            (leaf("0x7", "exx", "1"), "Invalid CPUID register. Must be one of [eax, ebx, ecx, edx]"),
            (leaf("0x7", "eax", "2"), "as a bitmap - unknown character: 2"),
            (leaf("0x7", "eax", &"1".repeat(33)), "as a bitmap - string is too long"),
            (
                r#"{"kvm_capabilities": ["x"]}"#.into(),
                "Failed to parse string [x] as a kvm capability - can not convert to numeric",
            ),
            (r#"{"reg_modifiers": []}"#.into(), "unknown field `reg_modifiers`"),
        ] {
            let error = serde_json::from_str::<Template>(&json).unwrap_err().to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }

    #[test]
    fn a_template_can_be_in_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source: Source = serde_json::from_value(serde_json::json!(file.path())).unwrap();
        assert!(source.template().unwrap_err().to_string().contains("EOF"));
        std::fs::write(file.path(), TEMPLATE).unwrap();
        assert_eq!(source.template().unwrap().msrs().count(), 1);
    }
}
