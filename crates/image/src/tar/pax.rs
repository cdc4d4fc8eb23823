//! PAX extended headers (POSIX.1-2001 "pax Extended Header"): records of `<length> <key>=<value>\n`.

use super::{Segment, Timestamp};

/// Extended attributes that one entry may have.
const MAX_XATTRS: usize = 256;

/// What the extended headers say of the next entry. Fields are absent where they say nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions {
    pub path: Option<Vec<u8>>,
    pub link_target: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Timestamp>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: SparseExtensions,
}

/// The `GNU.sparse.*` records.
#[derive(Clone, Debug, Default)]
pub(super) struct SparseExtensions {
    /// Version 1.0: the map stands before the data.
    pub map_in_data: bool,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// The map itself (versions 0.0 and 0.1).
    pub map: Option<Vec<Segment>>,
    /// The offset of a version 0.0 pair whose length has not come yet.
    pending_offset: Option<u64>,
}

impl Extensions {
    /// Adds the records of one extended header; later records replace earlier ones. `segments` bounds a sparse map.
    pub(super) fn parse(&mut self, mut records: &[u8], segments: usize) -> Result<(), String> {
        while !records.is_empty() {
            let (key, value, rest) = record(records).ok_or("its PAX header has a malformed record")?;
            self.set(key, value, segments).map_err(|reason| {
                format!("PAX record {:?}: {reason}", String::from_utf8_lossy(&key[..key.len().min(64)]))
            })?;
            records = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8], segments: usize) -> Result<(), String> {
        match key {
            b"path" => self.path = Some(text(value)?),
            b"linkpath" => self.link_target = Some(text(value)?),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(timestamp(value)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.set_xattr(name, value)?;
                } else if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.set(name, value, segments)?;
                }
            }
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        if name.is_empty() || name.contains(&0) {
            return Err("the name of the extended attribute is invalid".into());
        }
        if let Some((_, known)) = self.xattrs.iter_mut().find(|(known, _)| known == name) {
            *known = value.to_vec();
            return Ok(());
        }
        // A file has a handful of attributes; without a bound the search above would be quadratic.
        if self.xattrs.len() >= MAX_XATTRS {
            return Err(format!("more than {MAX_XATTRS} extended attributes"));
        }
        self.xattrs.push((name.to_vec(), value.to_vec()));
        Ok(())
    }
}

impl SparseExtensions {
    /// Whether the entry is a sparse file.
    pub(super) fn is_present(&self) -> bool {
        self.map_in_data || self.map.is_some()
    }

    fn set(&mut self, name: &[u8], value: &[u8], segments: usize) -> Result<(), String> {
        match name {
            b"major" => self.map_in_data = decimal::<u32>(value)? == 1,
            b"name" => self.name = Some(text(value)?),
            b"size" | b"realsize" => self.real_size = Some(decimal(value)?),
            // The number of segments: the map itself tells.
            b"numblocks" => drop(self.map.get_or_insert_default()),
            b"offset" => self.pending_offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = self.pending_offset.take().ok_or("a length without an offset")?;
                self.push(offset, decimal(value)?, segments)?;
            }
            b"map" => {
                self.map = Some(Vec::new());
                let mut numbers = value.split(|&b| b == b',');
                while let Some(offset) = numbers.next().filter(|n| !n.is_empty()) {
                    let length = numbers.next().ok_or("an offset without a length")?;
                    self.push(decimal(offset)?, decimal(length)?, segments)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, offset: u64, length: u64, segments: usize) -> Result<(), String> {
        let map = self.map.get_or_insert_default();
        if map.len() >= segments {
            return Err(format!("more than {segments} segments"));
        }
        map.push(Segment { offset, length });
        Ok(())
    }
}

/// Splits the first record off: key, value, rest.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    // 2^63 has 19 digits, so a space must stand among the first 20 bytes.
    let space = records.iter().take(20).position(|&b| b == b' ')?;
    let length = decimal::<usize>(&records[..space]).ok()?;
    if length <= space + 1 || length > records.len() {
        return None;
    }
    let body = records[space + 1..length].strip_suffix(b"\n")?;
    let equals = body.iter().position(|&b| b == b'=')?;
    (equals > 0).then_some((&body[..equals], &body[equals + 1..], &records[length..]))
}

fn text(value: &[u8]) -> Result<Vec<u8>, String> {
    if value.contains(&0) { Err("it has a NUL byte".into()) } else { Ok(value.to_vec()) }
}

pub(super) fn decimal<T: std::str::FromStr>(value: &[u8]) -> Result<T, String> {
    // `parse` alone would accept a leading plus sign.
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let parsed = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| "it is not a decimal number in range".into())
}

/// `[-]seconds[.fraction]`; digits past nanoseconds are dropped.
fn timestamp(value: &[u8]) -> Result<Timestamp, String> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let (whole, fraction) = match value.iter().position(|&b| b == b'.') {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &[][..]),
    };
    let seconds: i64 = decimal(whole)?;
    let mut nanoseconds = 0u32;
    for i in 0..9 {
        let digit = fraction.get(i).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return Err("it is not a decimal number".into());
        }
        nanoseconds = nanoseconds * 10 + u32::from(digit - b'0');
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds },
        // -1.25 is 0.75 after second -2.
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(records: &[u8]) -> Result<Extensions, String> {
        let mut extensions = Extensions::default();
        extensions.parse(records, 8).map(|()| extensions)
    }

    #[test]
    fn reads_records() {
        let parsed =
            parse(b"12 path=a=\n\n30 mtime=1350244992.023960108\n25 SCHILY.xattr.user.a=\0\n").unwrap();
        assert_eq!(parsed.path.as_deref(), Some(&b"a=\n"[..]));
        assert_eq!(parsed.mtime, Some(Timestamp { seconds: 1350244992, nanoseconds: 23960108 }));
        assert_eq!(parsed.xattrs, [(b"user.a".to_vec(), b"\0".to_vec())]);
    }

    #[test]
    fn refuses_malformed_records() {
        for bad in [
            &b"path=a\n"[..],
            b"9 path=a\n9 p",
            b"99 path=a\n",
            b"3 \n",
            b"5 =a\n",
            b"8 path=a",
            b"10 path=a\0\n",
            b"10 size=-1\n",
            b"99999999999999999999999 a=b\n",
        ] {
            assert!(parse(bad).is_err(), "{:?} was accepted", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn reads_times_before_the_epoch() {
        assert_eq!(timestamp(b"-1.25").unwrap(), Timestamp { seconds: -2, nanoseconds: 750_000_000 });
        assert_eq!(timestamp(b"-7").unwrap(), Timestamp { seconds: -7, nanoseconds: 0 });
        assert_eq!(timestamp(b"0.0000000019").unwrap(), Timestamp { seconds: 0, nanoseconds: 1 });
    }

    #[test]
    fn bounds_the_sparse_map() {
        assert!(parse(b"28 GNU.sparse.map=0,1,2,3,4\n").is_err());
        assert_eq!(parse(b"26 GNU.sparse.map=0,1,2,3\n").unwrap().sparse.map.unwrap().len(), 2);
        let nine = format!("GNU.sparse.map={}1,1\n", "1,1,".repeat(8));
        let record = format!("{} {nine}", nine.len() + 3);
        assert!(parse(record.as_bytes()).unwrap_err().contains("more than 8"));
    }
}
