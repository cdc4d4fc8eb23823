//! Virtual machines behind two small traits, and the choice of the best monitor for this host.
