//! Names that people can remember and that are safe as file names.

const ADJECTIVES: &[&str] = &[
    "amber", "bold", "brave", "bright", "brisk", "calm", "clear", "cosy", "crisp", "deft", "eager", "fair",
    "fleet", "fresh", "gentle", "glad", "grand", "happy", "honest", "jolly", "keen", "kind", "light",
    "lively", "lucky", "mellow", "merry", "mild", "modest", "neat", "nimble", "patient", "plain", "proud",
    "quick", "quiet", "ready", "sharp", "sly", "smooth", "snug", "solid", "steady", "still", "sunny",
    "swift", "tidy", "vivid", "warm", "wise",
];
const ANIMALS: &[&str] = &[
    "badger", "bat", "bear", "beaver", "bee", "bison", "crane", "crow", "deer", "dove", "duck", "eagle",
    "eel", "elk", "falcon", "ferret", "finch", "fox", "frog", "goat", "goose", "hare", "hawk", "heron",
    "horse", "ibis", "jay", "kite", "lark", "lion", "lynx", "mole", "moth", "newt", "otter", "owl", "panda",
    "puffin", "quail", "raven", "robin", "seal", "shrew", "snipe", "stork", "swan", "tern", "toad", "trout",
    "vole", "whale", "wolf", "wren", "yak",
];

/// An adjective, an animal and four digits.
pub(crate) fn random() -> String {
    let [a, b, c, d] = crate::paths::random_bytes::<4>();
    let adjective = ADJECTIVES[usize::from(a) % ADJECTIVES.len()];
    let animal = ANIMALS[usize::from(b) % ANIMALS.len()];
    format!("{adjective}-{animal}-{:04}", u16::from_le_bytes([c, d]) % 10_000)
}

/// Docker's rule, with a bound on the length: also a valid host name's first label after replacing `_` and `.`.
pub(crate) fn is_valid(name: &str) -> bool {
    let inner = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-');
    (1..=64).contains(&name.len()) && name.as_bytes()[0].is_ascii_alphanumeric() && name.bytes().all(inner)
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_names_are_valid_and_differ() {
        let names: std::collections::BTreeSet<_> = (0..50).map(|_| super::random()).collect();
        assert!(names.len() > 45);
        assert!(names.iter().all(|name| super::is_valid(name)), "{names:?}");
    }
}
