//! OCI images: pull, verify, import, unpack to EROFS, garbage-collect.
