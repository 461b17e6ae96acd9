//! The layers of a chain as devices, from the bottom up. Called by the opener of the chain, when all files
//! are open.

use std::sync::Arc;

use blockmirror_block::BlockDevice;

use super::ChainOpener;
use super::layer::Layer;
use crate::disk_image::{Backing, CommitLayer, Image, compressing};
use crate::error::Result;
use crate::protocol_id::ProtocolId;

/// What the top image stands on, and what the caller learns of it.
#[derive(Default)]
pub(super) struct LowerDevices {
    pub(super) device: Option<Arc<dyn BlockDevice>>,
    backing: Option<Backing>,
    base: Option<Box<CommitLayer>>,
}

impl ChainOpener<'_> {
    /// Makes the devices, from the bottom up.
    pub(super) fn build(
        self,
        top: Layer,
        lower: Vec<Layer>,
        typed: Option<Image>,
        own_files: usize,
    ) -> Result<Image> {
        let of_typed = typed.as_ref().map_or(Some(0), Image::allocated_bytes);
        let allocated = of_typed.and_then(|typed| {
            lower.iter().chain([&top]).try_fold(typed, |sum, layer| sum.checked_add(layer.allocated()?))
        });
        let below = self.lower_devices(lower, typed)?;
        let (mut device, qcow2) = top.device(below.device, self.options)?;
        if self.options.compress {
            device = compressing(&top.path, qcow2.as_ref())?;
        }
        if let Some(rules) = &self.options.node.disk_rules {
            device = rules.over(device)?;
        }
        Ok(Image {
            device: self.options.written_through(device),
            qcow2,
            base: below.base,
            format: top.format,
            path: top.path,
            backing: below.backing,
            files: self.files,
            layers: self.layers,
            stamps: self.stamps,
            own_files,
            notes: self.notes,
            allocated,
        })
    }

    /// The devices that the top image stands on: those of its header, or what its name says.
    pub(super) fn lower_devices(&self, lower: Vec<Layer>, typed: Option<Image>) -> Result<LowerDevices> {
        let mut below = LowerDevices::default();
        if let Some(image) = typed {
            let (name, path, format) = (image.path.clone(), image.path.clone(), image.format);
            below.device = Some(Arc::clone(&image.device));
            below.backing = Some(Backing { name, path, format });
        }
        for (index, layer) in lower.into_iter().enumerate().rev() {
            let (device, qcow2) = layer.device(below.device.take(), self.options)?;
            let backing = Backing { name: layer.name, path: layer.path, format: layer.format };
            if let Some((_, files)) = self.base.as_ref().filter(|(at, _)| *at == index) {
                below.base = Some(Box::new(CommitLayer {
                    device: self.options.written_through(Arc::clone(&device)),
                    backing: backing.clone(),
                    // A chain has at most `max_depth` images.
                    depth: index as u32 + 1,
                    files: self.files[files.clone()].iter().filter_map(ProtocolId::file).collect(),
                    qcow2,
                }));
            }
            (below.device, below.backing) = (Some(device), Some(backing));
        }
        Ok(below)
    }
}
