//! Changing the backing layer: the device that shows through, and the name in the header. They change
//! separately: an operation that puts an overlay on a disk, or takes a layer out of a chain, does both in the
//! order that it needs.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, ByteRange, Error as BlockError, ErrorKind};

use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::format::rewrite::{NewBacking, Step, change_backing};
use crate::image::Qcow2;

impl Qcow2 {
    /// Puts `device` below the image, in place of what is there; the old one is handed back. The header does
    /// not change.
    ///
    /// Waits for reads and changes under way, of a read-only image too. Not for a query of extents, whose
    /// visitor may itself use the image: one that began before may still ask the old device. What the guest
    /// reads changes wherever the two differ and the image
    /// holds nothing: that is the caller's affair.
    pub fn replace_backing(&self, device: Option<Arc<dyn BlockDevice>>) -> Option<Arc<dyn BlockDevice>> {
        let _only_one = self.changing.lock();
        let _nobody_reads = self.ranges.lock_exclusive_shielded(ByteRange::new(0, u64::MAX));
        std::mem::replace(&mut self.ctx.below.lock().device, device)
    }

    /// Makes the header name another backing file, or none, durably. Everything written before is durable
    /// first. The device below does not change.
    ///
    /// After a crash the header names the old file or the new one. With clusters of 1 and 2 KiB it may be
    /// torn.
    ///
    /// # Errors
    /// [`Error::Option`] for a name or a format that cannot stand in the header; [`Error::Storage`] for a
    /// read-only image, and if writing fails.
    pub fn set_backing_file(&self, name: Option<&[u8]>, format: Option<&str>) -> Result<()> {
        self.check_writable("change backing file")?;
        let new = self.check_new(name, format)?;
        let _only_one = self.changing.lock();
        self.flush()?;
        self.rewrite_header(
            |cluster, length| change_backing(cluster, length, new),
            |header| header.backing.as_ref().map(|b| b.name.as_bytes()) == name,
        )?;
        self.ctx.below.lock().named = name.is_some();
        Ok(())
    }

    /// Changes the header as `plan` says for the first cluster and the length of the fixed fields, durably.
    /// All that it is to point at is durable. The caller holds `changing`.
    ///
    /// # Errors
    /// The change has no room; or `is_meant` does not find it in what the header would say.
    pub(crate) fn rewrite_header(
        &self,
        plan: impl FnOnce(&[u8], usize) -> Result<Vec<Step>>,
        is_meant: impl FnOnce(&Header) -> bool,
    ) -> Result<()> {
        // The refcount table does not move, nor does anything else change the header, under the write-back
        // lock.
        let _no_write_back = self.write_back.lock();
        self.meta.lock().check_poison(&self.ctx, "change header")?;
        let cluster = self.first_cluster()?;
        let steps = plan(&cluster, Header::parse(&cluster)?.header_length as usize)?;
        self.write_steps("change header", cluster, &steps, is_meant)
    }

    /// Writes `steps` into the first cluster, which is `cluster`, each durably. The caller holds the
    /// write-back lock; all that the header will point at is durable.
    ///
    /// # Errors
    /// Before anything is written, if the header would not be as `expected`; a write that fails.
    pub(crate) fn write_steps(
        &self,
        operation: &'static str,
        mut cluster: Vec<u8>,
        steps: &[Step],
        expected: impl FnOnce(&Header) -> bool,
    ) -> Result<()> {
        for step in steps {
            cluster[step.at..step.at + step.bytes.len()].copy_from_slice(&step.bytes);
        }
        let header = Header::parse(&cluster)?;
        if !expected(&header) {
            let error = BlockError::new(ErrorKind::Corrupt, operation).in_file(self.ctx.name.clone());
            return Err(error.because("the header would not say what it is to say").into());
        }
        for step in steps {
            self.write_header(step.at as u64, &step.bytes)?;
        }
        self.set_header(header);
        Ok(())
    }

    /// Whether [`rewrite_header`](Self::rewrite_header) has room for the change.
    ///
    /// # Errors
    /// It has not.
    pub(crate) fn check_header_change(
        &self,
        plan: impl FnOnce(&[u8], usize) -> Result<Vec<Step>>,
    ) -> Result<()> {
        let cluster = self.first_cluster()?;
        plan(&cluster, Header::parse(&cluster)?.header_length as usize).map(drop)
    }

    /// Whether the header could name that backing file: for callers that find out before they begin something
    /// long.
    ///
    /// # Errors
    /// As for [`set_backing_file`](Self::set_backing_file), of an image that is writable by then.
    pub fn check_backing_file(&self, name: Option<&[u8]>, format: Option<&str>) -> Result<()> {
        let new = self.check_new(name, format)?;
        self.check_header_change(|cluster, length| change_backing(cluster, length, new))
    }

    fn check_new<'a>(
        &self,
        name: Option<&'a [u8]>,
        format: Option<&'a str>,
    ) -> Result<Option<NewBacking<'a>>> {
        let new = name.map(|name| NewBacking { name, format });
        if let Some(new) = &new {
            new.check()?;
            if self.raw_data_file() {
                let problem = "an image with a raw data file cannot have one".into();
                return Err(Error::Option { option: "backing_file", problem });
            }
        } else if format.is_some() {
            let problem = "it needs a backing_file".into();
            return Err(Error::Option { option: "backing_fmt", problem });
        }
        Ok(new)
    }

    /// At most 2 MiB. What the file lacks of it reads as zeros.
    pub(crate) fn first_cluster(&self) -> Result<Vec<u8>> {
        let mut cluster = vec![0; self.ctx.cluster().bytes() as usize];
        self.ctx.storage.read_at(&mut cluster, 0)?;
        Ok(cluster)
    }
}
