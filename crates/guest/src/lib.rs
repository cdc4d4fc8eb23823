//! The guest's kernel and initramfs: fetched, extracted, put together and cached.
