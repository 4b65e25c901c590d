//! The TCP link against the contract, against a cut cable, and against a hostile peer.

use super::frame::{Descriptor, Header};
use super::*;
use crate::contract::{Pair, Random, contents, fill, poll_until, post_all, regions, request, soon};
use crate::*;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Connected streams: the initiator's ends and the target's.
fn streams(lanes: usize) -> (Vec<TcpStream>, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (0..lanes).map(|_| (TcpStream::connect(address).unwrap(), listener.accept().unwrap().0)).unzip()
}

fn pair_with(lanes: usize, options: TcpOptions) -> Pair {
    let (here, there) = streams(lanes);
    Pair {
        initiator: Box::new(TcpInitiator::new(here, options).unwrap()),
        target: Box::new(TcpTarget::new(there).unwrap()),
    }
}

mod auto {
    crate::contract::contract_tests!(|lanes| super::pair_with(lanes, super::TcpOptions::default()));
}

mod zero_copy {
    use super::{TcpOptions, ZeroCopy};
    const ALWAYS: TcpOptions =
        TcpOptions { zero_copy: ZeroCopy::Always, window_bytes: 4 << 20, window_requests: 64 };
    crate::contract::contract_tests!(|lanes| super::pair_with(lanes, ALWAYS));
}

mod local {
    use super::{Pair, TcpInitiator, TcpOptions, TcpTarget, UnixStream};
    crate::contract::contract_tests!(|lanes| {
        let pairs = (0..lanes).map(|_| UnixStream::pair().unwrap());
        let (here, there): (Vec<_>, Vec<_>) = pairs.unzip();
        Pair {
            initiator: Box::new(TcpInitiator::new(here, TcpOptions::default()).unwrap()),
            target: Box::new(TcpTarget::new(there).unwrap()),
        }
    });
}

/// A target and a raw socket in the place of its initiator's only lane.
fn target_and_raw() -> (TcpTarget, TcpStream) {
    let (mut here, there) = streams(1);
    (TcpTarget::new(there).unwrap(), here.remove(0))
}

/// An initiator and a raw socket in the place of its target's only lane.
fn initiator_and_raw() -> (TcpInitiator, TcpStream) {
    let (here, mut there) = streams(1);
    (TcpInitiator::new(here, TcpOptions::default()).unwrap(), there.remove(0))
}

fn write_frame(descriptors: &[Descriptor], payload: &[u8]) -> Vec<u8> {
    let header =
        Header::Write { descriptors: descriptors.len(), payload_bytes: payload.len() as u64 };
    let mut bytes = header.encode().to_vec();
    descriptors.iter().for_each(|descriptor| bytes.extend(descriptor.encode()));
    bytes.extend(payload);
    bytes
}

#[test]
fn a_cut_lane_is_named_at_both_ends_while_they_wait() {
    let (here, there) = streams(3);
    let knife = here[1].try_clone().unwrap();
    let mut pair = Pair {
        initiator: Box::new(TcpInitiator::new(here, TcpOptions::default()).unwrap()),
        target: Box::new(TcpTarget::new(there).unwrap()),
    };
    let (source, _destination, remote) = regions(&mut pair, 8 << 20, &mut Random(1));
    let batch: Vec<_> = (0..8)
        .map(|at| request(at, &source, (at as usize) << 20, 1 << 20, remote, (at as usize) << 20))
        .collect();
    let Pair { mut initiator, mut target } = pair;
    let asked = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            let error = target.wait_fence(FenceTag(1), soon()).unwrap_err();
            let placed = target.bytes_placed().unwrap_err();
            // The target lives on: its end would close the other lanes too.
            (error, placed, target)
        });
        let mut out = Vec::new();
        for _ in 0..10 {
            post_all(&mut *initiator, &batch, &mut out).unwrap();
        }
        knife.shutdown(Shutdown::Both).unwrap();
        let error = loop {
            if let Err(e) = initiator.poll(&mut out, soon()) {
                break e;
            }
        };
        assert!(
            matches!(error, Error::Lane { lane: 1, .. } | Error::Closed { lane: 1 }),
            "{error:?}"
        );
        assert!(error.to_string().contains("lane 1"));
        let again = [initiator.post(&batch).err(), initiator.fence(FenceTag(2)).err()];
        assert!(
            again.iter().all(|e| matches!(
                e,
                Some(Error::Lane { lane: 1, .. } | Error::Closed { lane: 1 })
            ))
        );
        let (waited, placed, _target) = waiting.join().unwrap();
        for error in [waited, placed] {
            assert!(
                matches!(error, Error::Lane { lane: 1, .. } | Error::Closed { lane: 1 }),
                "{error:?}"
            );
        }
    });
    assert!(asked.elapsed() < Duration::from_secs(5), "an error comes at once, not at a deadline");
}

#[test]
fn a_silent_target_costs_a_deadline_and_bounded_memory() {
    let (mut initiator, _raw) = initiator_and_raw();
    let source = MemoryRegion::anonymous(2 << 20).unwrap();
    initiator.register(&source).unwrap();
    let remote = RemoteRegion { base: 0, len: 2 << 20, key: RemoteKey(0) };
    let write = request(0, &source, 0, 2 << 20, remote, 0);
    let mut out = Vec::new();
    let mut posted = 0;
    // Until the socket's buffers and the window are full and stay so.
    let asked = loop {
        let accepted = initiator.post(std::slice::from_ref(&write)).unwrap();
        posted += accepted;
        assert!(posted < 100, "a window of 8 MiB accepted {posted} writes of 2 MiB");
        let asked = Instant::now();
        if accepted == 0
            && initiator.poll(&mut out, asked + Duration::from_millis(200)).unwrap() == 0
        {
            break asked;
        }
    };
    assert!(asked.elapsed() >= Duration::from_millis(200));
    assert_eq!(posted - out.len(), 4, "the window");
    let dropping = Instant::now();
    drop(initiator);
    assert!(dropping.elapsed() < Duration::from_secs(2));
}

#[test]
fn zero_copy_to_a_silent_target_does_not_hold_up_the_end() {
    // With a small buffer the end comes in the middle of a message, with a large one behind some.
    for send_buffer_bytes in [64 << 10, 4 << 20] {
        let (here, there) = streams(1);
        rustix::net::sockopt::set_socket_send_buffer_size(&here[0], send_buffer_bytes).unwrap();
        let options = TcpOptions { zero_copy: ZeroCopy::Always, ..TcpOptions::default() };
        let mut initiator = TcpInitiator::new(here, options).unwrap();
        let source = MemoryRegion::anonymous(2 << 20).unwrap();
        initiator.register(&source).unwrap();
        let remote = RemoteRegion { base: 0, len: 2 << 20, key: RemoteKey(0) };
        let batch = vec![request(0, &source, 0, 2 << 20, remote, 0); 4];
        assert_eq!(initiator.post(&batch).unwrap(), 4);
        // The first bytes are there: the message is on its way.
        there[0].peek(&mut [0]).unwrap();
        let dropping = Instant::now();
        drop(initiator);
        assert!(dropping.elapsed() < DRAIN_PATIENCE, "{:?}", dropping.elapsed());
    }
}

#[test]
fn hostile_frames_are_named_and_write_nothing() {
    let page = vec![7; 4096];
    let at = |key, len, addr| Descriptor { key, len, addr };
    let cases = |remote: RemoteRegion| {
        let end = remote.base + remote.len;
        vec![
            ("key 9", write_frame(&[at(9, 4096, remote.base)], &page)),
            ("outside", write_frame(&[at(0, 4096, end - 4095)], &page)),
            ("outside", write_frame(&[at(0, 4096, remote.base - 1)], &page)),
            ("outside", write_frame(&[at(0, 4096, u64::MAX - 100)], &page)),
            ("outside", write_frame(&[at(0, 4096, 0)], &page)),
            // The first descriptor is right: still nothing may be placed.
            ("outside", write_frame(&[at(0, 2048, remote.base), at(0, 2048, end)], &page)),
            ("for a payload of", write_frame(&[at(0, u32::MAX, remote.base)], &page)),
            ("zero bytes", write_frame(&[at(0, 0, remote.base), at(0, 4096, remote.base)], &page)),
            (
                "descriptors",
                [&b"PF\x01\0"[..], &u32::MAX.to_le_bytes(), &4096u64.to_le_bytes()].concat(),
            ),
            (
                "a frame of",
                [&b"PF\x01\0"[..], &1u32.to_le_bytes(), &u64::MAX.to_le_bytes()].concat(),
            ),
            ("unknown kind", [&b"PF\x09\0"[..], &[0; 12]].concat()),
            ("magic", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
            ("answer", Header::FenceAck(FenceTag(1)).encode().to_vec()),
            (
                "again",
                [Header::Fence(FenceTag(1)).encode(), Header::Fence(FenceTag(1)).encode()].concat(),
            ),
        ]
    };
    for case in 0..14 {
        let (mut target, mut raw) = target_and_raw();
        let region = MemoryRegion::anonymous(8192).unwrap();
        let remote = target.expose(&region).unwrap();
        let (expected, bytes) = cases(remote).swap_remove(case);
        raw.write_all(&bytes).unwrap();
        let error = target.wait_fence(FenceTag(100), soon()).unwrap_err();
        assert!(
            matches!(&error, Error::Protocol { lane: 0, what } if what.contains(expected)),
            "{error}: {expected}"
        );
        assert!(contents(&region) == vec![0; 8192], "{expected}");
        // The peer is cut off: what it sent before that, and an end or a reset.
        let mut rest = Vec::new();
        let _ = raw.read_to_end(&mut rest);
        assert!(rest.len() <= super::frame::HEADER_BYTES);
    }
}

#[test]
fn a_frame_cut_short_at_any_place_is_an_error_and_no_fence() {
    let (mut target, _raw) = target_and_raw();
    let region = MemoryRegion::anonymous(4096).unwrap();
    let remote = target.expose(&region).unwrap();
    let mut whole = write_frame(&[Descriptor { key: 0, len: 64, addr: remote.base }], &[7; 64]);
    whole.extend(Header::Fence(FenceTag(1)).encode());
    for len in 0..whole.len() {
        let (mut target, mut raw) = target_and_raw();
        target.expose(&region).unwrap();
        raw.write_all(&whole[..len]).unwrap();
        drop(raw);
        let error = target.wait_fence(FenceTag(1), soon()).unwrap_err();
        assert!(matches!(error, Error::Closed { lane: 0 }), "{len}: {error:?}");
    }
}

#[test]
fn bytes_that_come_one_by_one_are_placed_all_the_same() {
    let (mut target, mut raw) = target_and_raw();
    let region = MemoryRegion::anonymous(4096).unwrap();
    let remote = target.expose(&region).unwrap();
    let descriptors = [
        Descriptor { key: 0, len: 3, addr: remote.base + 9 },
        Descriptor { key: 0, len: 2, addr: remote.base },
    ];
    let mut bytes = write_frame(&descriptors, b"ferry");
    bytes.extend(Header::Fence(FenceTag(8)).encode());
    raw.set_nodelay(true).unwrap();
    bytes.iter().for_each(|&byte| raw.write_all(&[byte]).unwrap());
    target.wait_fence(FenceTag(8), soon()).unwrap();
    let placed = contents(&region);
    assert_eq!((&placed[9..12], &placed[..2]), (&b"fer"[..], &b"ry"[..]));
    assert_eq!(target.bytes_placed().unwrap(), 5);
    let mut ack = [0; super::frame::HEADER_BYTES];
    raw.read_exact(&mut ack).unwrap();
    assert_eq!(Header::decode(&ack), Ok(Header::FenceAck(FenceTag(8))));
}

#[test]
fn what_comes_behind_the_last_fence_is_not_read() {
    let (mut target, mut raw) = target_and_raw();
    let region = MemoryRegion::anonymous(4096).unwrap();
    let remote = target.expose(&region).unwrap();
    let frame =
        |byte| write_frame(&[Descriptor { key: 0, len: 64, addr: remote.base }], &[byte; 64]);
    raw.write_all(&[frame(7), Header::LastFence(FenceTag(3)).encode().to_vec(), frame(8)].concat())
        .unwrap();
    target.wait_fence(FenceTag(3), soon()).unwrap();
    // By itself, before anybody revokes.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(contents(&region)[..64], [7; 64]);
    assert_eq!(target.bytes_placed().unwrap(), 64);
    target.revoke().unwrap();
    assert_eq!(contents(&region)[..64], [7; 64]);
    drop(target);
    // No acknowledgement, and the end.
    let mut rest = Vec::new();
    let _ = raw.read_to_end(&mut rest);
    assert_eq!(rest, []);
}

#[test]
fn progress_shows_within_a_frame() {
    let (mut target, mut raw) = target_and_raw();
    let region = MemoryRegion::anonymous(1 << 20).unwrap();
    let remote = target.expose(&region).unwrap();
    let bytes =
        write_frame(&[Descriptor { key: 0, len: 1 << 20, addr: remote.base }], &vec![7; 1 << 20]);
    let half = bytes.len() - (1 << 19);
    raw.write_all(&bytes[..half]).unwrap();
    let deadline = soon();
    while target.bytes_placed().unwrap() < 1 << 19 {
        assert!(Instant::now() < deadline, "half of a frame came and does not show");
        std::thread::yield_now();
    }
    assert!(matches!(target.wait_fence(FenceTag(1), Instant::now()), Err(Error::Timeout { .. })));
}

#[test]
fn random_bytes_never_write_outside_what_is_exposed() {
    let seed = crate::contract::seed();
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    for _ in 0..200 {
        let (mut target, mut raw) = target_and_raw();
        // The exposed region is the middle of a larger mapping of the same file, whose edges must
        // stay as they are.
        let file = rustix::fs::memfd_create("edges", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 3 * 4096).unwrap();
        let file = std::os::fd::AsFd::as_fd(&file);
        let all = MemoryRegion::map_shared(file, 0, 3 * 4096, Access::Write).unwrap();
        let middle = MemoryRegion::map_shared(file, 4096, 4096, Access::Write).unwrap();
        let remote = target.expose(&middle).unwrap();
        let mut bytes = Vec::new();
        for _ in 0..1 + random.below(4) {
            let len = 1 + random.below(5000) as u32;
            let addr = remote.base.wrapping_sub(3000).wrapping_add(random.next() % 10_000);
            let descriptor = Descriptor { key: random.below(2) as u32, len, addr };
            bytes.extend(write_frame(&[descriptor], &vec![0xff; len as usize]));
        }
        for _ in 0..random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] = random.next() as u8;
        }
        // The target may hang up in the middle.
        let _ = raw.write_all(&bytes);
        let _ = raw.shutdown(Shutdown::Write);
        assert!(target.wait_fence(FenceTag(1), soon()).is_err());
        let all = contents(&all);
        assert!(all[..4096].iter().chain(&all[8192..]).all(|&byte| byte == 0), "seed {seed:#x}");
    }
}

#[test]
fn an_answer_that_nothing_asked_for_breaks_the_initiator() {
    for bytes in
        [Header::FenceAck(FenceTag(1)).encode(), Header::Fence(FenceTag(1)).encode(), [0; 16]]
    {
        let (mut initiator, mut raw) = initiator_and_raw();
        raw.write_all(&bytes).unwrap();
        let error = initiator.poll(&mut Vec::new(), soon()).unwrap_err();
        assert!(matches!(error, Error::Protocol { lane: 0, .. }), "{error:?}");
    }
}

#[test]
fn completions_that_came_before_the_break_are_still_handed_out() {
    let (mut initiator, mut raw) = initiator_and_raw();
    initiator.fence(FenceTag(1)).unwrap();
    let mut fence = [0; super::frame::HEADER_BYTES];
    raw.read_exact(&mut fence).unwrap();
    assert_eq!(Header::decode(&fence), Ok(Header::Fence(FenceTag(1))));
    raw.write_all(&Header::FenceAck(FenceTag(1)).encode()).unwrap();
    drop(raw);
    let mut out = Vec::new();
    assert_eq!(initiator.poll(&mut out, soon()).unwrap(), 1);
    assert_eq!(out, [Completion::Fence(FenceTag(1))]);
    assert!(matches!(initiator.poll(&mut out, soon()), Err(Error::Closed { lane: 0 })));
}

#[test]
fn the_source_may_change_while_it_is_sent_and_the_last_write_is_what_counts() {
    let mut pair = pair_with(2, TcpOptions::default());
    let (source, destination, remote) = regions(&mut pair, 4 << 20, &mut Random(1));
    let mut random = Random(2);
    let batch: Vec<_> = (0..1024)
        .map(|page| request(page as u64, &source, page * 4096, 4096, remote, page * 4096))
        .collect();
    let mut out = Vec::new();
    for _ in 0..5 {
        post_all(&mut *pair.initiator, &batch, &mut out).unwrap();
        fill(&source, &mut random);
    }
    post_all(&mut *pair.initiator, &batch, &mut out).unwrap();
    pair.initiator.fence(FenceTag(1)).unwrap();
    pair.target.wait_fence(FenceTag(1), soon()).unwrap();
    assert!(contents(&destination) == contents(&source));
    poll_until(&mut *pair.initiator, &mut out, |out| out.len() == 6 * 1024 + 1).unwrap();
}

#[test]
fn a_link_needs_lanes_and_not_too_many() {
    assert!(matches!(TcpTarget::new(Vec::<TcpStream>::new()), Err(Error::Bounds { .. })));
    let (here, _there) = streams(LANES_MAX + 1);
    assert!(matches!(TcpInitiator::new(here, TcpOptions::default()), Err(Error::Bounds { .. })));
}

#[test]
fn a_peer_that_vanishes_is_noticed_by_the_kernel() {
    use rustix::net::sockopt;
    let (here, there) = streams(1);
    let ends = [here[0].try_clone().unwrap(), there[0].try_clone().unwrap()];
    let _initiator = TcpInitiator::new(here, TcpOptions::default()).unwrap();
    let _target = TcpTarget::new(there).unwrap();
    for end in ends {
        assert_eq!(sockopt::tcp_user_timeout(&end).unwrap(), 10_000);
        assert!(sockopt::socket_keepalive(&end).unwrap());
        assert!(sockopt::tcp_keepidle(&end).unwrap() < PEER_TIMEOUT);
        assert!(sockopt::tcp_nodelay(&end).unwrap());
    }
}

#[test]
fn streams_left_non_blocking_by_their_maker_do_as_well() {
    let (here, there) = streams(2);
    here.iter().chain(&there).for_each(|stream| stream.set_nonblocking(true).unwrap());
    let mut pair = Pair {
        initiator: Box::new(TcpInitiator::new(here, TcpOptions::default()).unwrap()),
        target: Box::new(TcpTarget::new(there).unwrap()),
    };
    let (source, destination, remote) = regions(&mut pair, 2 << 20, &mut Random(1));
    let write = request(0, &source, 0, 2 << 20, remote, 0);
    post_all(&mut *pair.initiator, &[write], &mut Vec::new()).unwrap();
    pair.initiator.fence(FenceTag(1)).unwrap();
    pair.target.wait_fence(FenceTag(1), soon()).unwrap();
    assert!(contents(&destination) == contents(&source));
}
