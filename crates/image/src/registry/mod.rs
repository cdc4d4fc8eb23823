//! Pulling.
use crate::{Image, Progress, PullOptions, Reference, Result, Store};
pub(crate) async fn pull(_: &Store, _: &Reference, _: &PullOptions, _: &dyn Progress) -> Result<Image> {
    todo!()
}
