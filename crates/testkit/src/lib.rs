//! Fixtures for the tests: tiny images, a local registry, hostile archives.
