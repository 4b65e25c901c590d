//! A TCP proxy between a source and a destination that can cut and stall what goes through it. It
//! tells the control connection from the lanes by their first bytes.

use pageferry_transport::preamble::{PREAMBLE_BYTES, Preamble, Role};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often a stalled or idle connection looks whether it still is.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const PIECE_BYTES: usize = 128 << 10;

/// Which connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The control connection.
    Control,
    /// The lanes.
    Lanes,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Proxy {
    /// Where a source is to connect.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: Mutex<SocketAddr>,
    stalled: AtomicBool,
    ended: AtomicBool,
    /// Those that have not ended, by the source's address.
    connections: Mutex<HashMap<SocketAddr, (Which, TcpStream, TcpStream)>>,
}

impl Proxy {
    /// Listens on a free port and passes everything on to `target`.
    ///
    /// # Panics
    /// If there is no port.
    #[must_use]
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            stalled: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for source in listener.incoming().map_while(Result::ok) {
                if accepting.ended.load(Ordering::Acquire) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || {
                    // A connection that dies in its first bytes is what a real network has too.
                    let _ = shared.carry(source);
                });
            }
        });
        Self { address, shared }
    }

    /// Sends later connections elsewhere.
    pub fn retarget(&self, target: SocketAddr) {
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// Cuts every such connection, at both ends. Returns how many.
    #[must_use]
    pub fn cut(&self, which: Which) -> usize {
        let mut connections =
            self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let before = connections.len();
        connections.retain(|_, (kind, source, target)| {
            if *kind == which {
                let _ = source.shutdown(Shutdown::Both);
                let _ = target.shutdown(Shutdown::Both);
            }
            *kind != which
        });
        before - connections.len()
    }

    /// Neither reads nor writes any more (or does again): a network that swallows everything.
    pub fn stall(&self, stalled: bool) {
        self.shared.stalled.store(stalled, Ordering::Release);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn carry(self: Arc<Self>, mut source: TcpStream) -> std::io::Result<()> {
        let mut first = [0; PREAMBLE_BYTES];
        source.read_exact(&mut first)?;
        let which = match Preamble::decode(&first) {
            Ok(Preamble { role: Role::Lane(_), .. }) => Which::Lanes,
            _ => Which::Control,
        };
        let to = *self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let mut target = TcpStream::connect(to)?;
        target.write_all(&first)?;
        for stream in [&source, &target] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(LOOK_EVERY))?;
        }
        let (peer, kept) = (source.peer_addr()?, (which, source.try_clone()?, target.try_clone()?));
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, kept);
        let back = (target.try_clone()?, source.try_clone()?);
        let shared = Arc::clone(&self);
        std::thread::spawn(move || shared.pass(back.0, back.1));
        self.pass(source, target);
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
        Ok(())
    }

    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut piece = vec![0; PIECE_BYTES];
        while !self.ended.load(Ordering::Acquire) {
            match from.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => {
                    // After the read: what came while it was waiting is swallowed too.
                    while self.stalled.load(Ordering::Acquire)
                        && !self.ended.load(Ordering::Acquire)
                    {
                        std::thread::sleep(LOOK_EVERY);
                    }
                    if to.write_all(&piece[..n]).is_err() {
                        break;
                    }
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(_) => {
                    // A reset is passed on as an end of both ways.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}
