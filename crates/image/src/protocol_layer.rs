//! The layer below a format: a host file, an export of an NBD server, or what stands for one.
//!
//! A name that a person types leads to a file or an export; a name in an image leads to a file
//! ([`crate::ReferencePolicy`]). Only this module knows that there is a network. Called by opening, creating
//! and describing images.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_file::{FileOptions, FileStorage, LockMode, PathHandle};
use blockmirror_filter::{BlkdebugOptions, BlkdebugStorage, DEFAULT_NULL_SIZE, NullDisk, NullStorage};
#[cfg(feature = "nbd")]
use blockmirror_nbd::{Client, ClientStorage, NbdUri};
use blockmirror_qcow2::Unfinished;

#[cfg(feature = "nbd")]
use crate::error::Error;
use crate::error::Result;
#[cfg(feature = "nbd")]
use crate::nbd::NbdOptions;
use crate::protocol_id::ProtocolId;
#[cfg(feature = "nbd")]
use crate::protocol_id::is_uri;
use crate::storage_stamp::StorageStamp;

/// An open storage that holds an image.
#[derive(Clone, Debug)]
pub(crate) enum ProtocolLayer {
    File(Arc<FileStorage>),
    /// Zeros, below an image.
    Null(Arc<NullStorage>),
    /// A layer with fault injection (blkdebug).
    Failing(Box<Self>, Arc<BlkdebugStorage>),
    #[cfg(feature = "nbd")]
    Export(Arc<Client>),
    /// A layer whose qcow2 image is marked as unfinished.
    Unfinished(Box<Self>, Arc<Unfinished>),
}

/// How a layer is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) writable: bool,
    pub(crate) lock: LockMode,
    /// A block device must be neither mounted nor held.
    pub(crate) claim: bool,
    /// Past the host's page cache.
    pub(crate) direct: bool,
    /// The same for reads alone, by other means where a file system has no direct I/O.
    pub(crate) past_cache: bool,
    /// Flushes of files do nothing.
    pub(crate) no_sync: bool,
    #[cfg(feature = "nbd")]
    pub(crate) nbd: NbdOptions,
}

impl Access {
    fn file_options(self) -> FileOptions {
        let options = FileOptions::new().writable(self.writable).claim(self.claim);
        options.direct(self.direct).no_sync(self.no_sync).lock(self.lock)
    }

    /// The layer of `file`, which has been opened so.
    fn file(self, file: FileStorage) -> Result<ProtocolLayer> {
        if self.past_cache {
            file.read_past_cache()?;
        }
        Ok(ProtocolLayer::File(Arc::new(file)))
    }
}

impl ProtocolLayer {
    /// Opens what the caller names `path`.
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self> {
        #[cfg(feature = "nbd")]
        if is_uri(path) {
            let uri = NbdUri::try_from(path).map_err(|cause| Error::Uri { path: path.to_owned(), cause })?;
            let options = access.nbd.client(uri).writable(access.writable);
            return Ok(Self::Export(Arc::new(options.open()?)));
        }
        access.file(access.file_options().open(path)?)
    }

    /// Opens a file that was found, which messages call `path`.
    pub(crate) fn open_handle(handle: &PathHandle, path: &Path, access: Access) -> Result<Self> {
        access.file(access.file_options().open_handle(handle, path)?)
    }

    /// Zeros.
    pub(crate) fn null() -> Self {
        Self::Null(Arc::new(NullStorage::new(DEFAULT_NULL_SIZE)))
    }

    /// What `disk` says.
    pub(crate) fn zeros(disk: NullDisk) -> Self {
        Self::Null(Arc::new(NullStorage::from(disk)))
    }

    /// `protocol`, which fails as `rules` say.
    pub(crate) fn failing(protocol: Self, rules: BlkdebugOptions) -> Result<Self> {
        let storage = BlkdebugStorage::new(protocol.storage(), rules).map_err(|error| {
            let why = error.to_string();
            blockmirror_block::Error::new(blockmirror_block::ErrorKind::InvalidInput, "open").because(why)
        })?;
        Ok(Self::Failing(Box::new(protocol), Arc::new(storage.announced())))
    }

    pub(crate) fn id(&self) -> ProtocolId {
        match self {
            Self::Null(zeros) => ProtocolId::Null(Arc::as_ptr(zeros).addr()),
            Self::Failing(protocol, _) => protocol.id(),
            Self::File(file) => ProtocolId::File(file.id()),
            #[cfg(feature = "nbd")]
            Self::Export(client) => ProtocolId::of_export(client.uri().clone()),
            Self::Unfinished(protocol, _) => protocol.id(),
        }
    }

    /// Which storage it is; `None` of zeros.
    pub(crate) fn stamp(&self) -> Result<Option<StorageStamp>> {
        match self {
            Self::File(file) => match file.device_stamp()? {
                Some(device) => Ok(Some(StorageStamp::Device(device))),
                None => Ok(file.stamp()?.map(StorageStamp::File)),
            },
            Self::Null(_) => Ok(None),
            #[cfg(feature = "nbd")]
            Self::Export(_) => {
                let ProtocolId::Export(address, export) = self.id() else { return Ok(None) };
                let len = self.plain_storage().len()?;
                Ok(Some(StorageStamp::of_export(&address, &export, len)))
            }
            Self::Failing(protocol, _) | Self::Unfinished(protocol, _) => protocol.stamp(),
        }
    }

    /// The host file, if its bytes lie in one.
    pub(crate) fn host_file(&self) -> Option<&Arc<FileStorage>> {
        match self {
            Self::File(file) => Some(file),
            Self::Null(_) => None,
            #[cfg(feature = "nbd")]
            Self::Export(_) => None,
            Self::Failing(protocol, _) | Self::Unfinished(protocol, _) => protocol.host_file(),
        }
    }

    /// It as what a format lives in.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        match self {
            Self::Null(zeros) => Arc::clone(zeros) as _,
            Self::Failing(_, storage) => Arc::clone(storage) as _,
            Self::File(file) => Arc::clone(file) as _,
            #[cfg(feature = "nbd")]
            Self::Export(client) => Arc::new(ClientStorage::new(Arc::clone(client))),
            Self::Unfinished(_, storage) => Arc::clone(storage) as _,
        }
    }

    /// It as what a disk without a format lives in.
    pub(crate) fn plain_storage(&self) -> Arc<dyn Storage> {
        match self {
            Self::Null(_) | Self::Failing(..) => self.storage(),
            Self::File(file) => Arc::clone(file) as _,
            #[cfg(feature = "nbd")]
            Self::Export(client) => Arc::new(ClientStorage::plain(Arc::clone(client))),
            Self::Unfinished(protocol, _) => protocol.plain_storage(),
        }
    }
}
