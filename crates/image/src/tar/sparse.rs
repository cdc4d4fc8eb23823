//! Maps of sparse files.

use super::Segment;
use super::header::number;

/// Reads descriptors of 24 bytes (offset, length) of an old GNU sparse header; the first empty one ends the list.
/// Returns whether it was reached.
pub(super) fn gnu_descriptors(bytes: &[u8], map: &mut Vec<Segment>) -> Result<bool, String> {
    for descriptor in bytes.chunks_exact(24) {
        if descriptor[0] == 0 {
            return Ok(true);
        }
        let field = |range| number(&descriptor[range]).and_then(|n| u64::try_from(n).ok());
        match (field(0..12), field(12..24)) {
            (Some(offset), Some(length)) => map.push(Segment { offset, length }),
            _ => return Err("its sparse map is malformed".into()),
        }
    }
    Ok(false)
}

/// Checks that the segments ascend within the file and hold exactly the archive's `stored` bytes. Empty ones (GNU tar
/// marks a hole at the end of the file so) are dropped.
pub(super) fn check(mut map: Vec<Segment>, real_size: u64, stored: u64) -> Result<Vec<Segment>, String> {
    let (mut end, mut total) = (0u64, 0u64);
    for segment in &map {
        let segment_end = segment.offset.checked_add(segment.length).filter(|&end| end <= real_size);
        match segment_end {
            Some(segment_end) if segment.offset >= end => end = segment_end,
            _ => return Err("its sparse map overlaps itself or leaves the file".into()),
        }
        // No overflow: disjoint segments within `real_size`.
        total += segment.length;
    }
    if total != stored {
        return Err(format!("its sparse map has {total} bytes of data and the archive {stored}"));
    }
    map.retain(|segment| segment.length > 0);
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_ascending_segments_only() {
        let segment = |offset, length| Segment { offset, length };
        assert_eq!(check(vec![segment(0, 2), segment(8, 2), segment(10, 0)], 10, 4).unwrap().len(), 2);
        assert!(check(vec![segment(0, 2), segment(1, 2)], 10, 4).is_err(), "overlap");
        assert!(check(vec![segment(8, 2), segment(0, 2)], 10, 4).is_err(), "order");
        assert!(check(vec![segment(8, 3)], 10, 3).is_err(), "past the end");
        assert!(check(vec![segment(u64::MAX, 3)], 10, 3).is_err(), "overflow");
        assert!(check(vec![segment(0, 2)], 10, 3).is_err(), "another size than stored");
    }
}
