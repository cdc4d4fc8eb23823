//! The agent's ttrpc API and its limits: the whole contract between host and guest.
