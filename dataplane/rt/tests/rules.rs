//! The rules that make monoio safe for a proxy, one test a rule, on both drivers.

#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    rc::Rc,
    time::Duration,
};

use culvert_rt::{
    Buffer, ConnectOptions, Driver, DriverChoice, Listener, Runtime, RuntimeOptions, Signal,
    Socket, Watch, Wheel, bind_listener, connect, mailbox, spawn,
};

/// Runs a future on a worker of each driver, each in its own thread.
fn on_both<F: Future<Output = ()>>(future: impl Fn() -> F + Send + Sync + Clone + 'static) {
    for driver in [DriverChoice::IoUring, DriverChoice::Epoll] {
        on(driver, future.clone());
    }
}

fn on<F: Future<Output = ()>>(driver: DriverChoice, future: impl Fn() -> F + Send + 'static) {
    std::thread::spawn(move || {
        let runtime = Runtime::build(RuntimeOptions { driver, entries: 256 }).unwrap();
        let epoll = driver == DriverChoice::Epoll;
        assert_eq!(runtime.driver(), if epoll { Driver::Epoll } else { Driver::IoUring });
        runtime.block_on(future());
    })
    .join()
    .unwrap();
}

fn socket(stream: TcpStream) -> Socket {
    stream.set_nonblocking(true).unwrap();
    Socket::from_fd(OwnedFd::from(stream)).unwrap()
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

#[test]
fn clients_are_accepted_by_readiness_and_have_nodelay_from_the_first_byte() {
    on_both(|| async {
        let fd = bind_listener("127.0.0.1:0".parse().unwrap(), false).unwrap();
        let listener = Listener::from_fd(fd).unwrap();
        let address = listener.local_addr().unwrap();
        // Waits that are dropped lose no client.
        let watch = Watch::new();
        watch.stop(1);
        assert!(watch.guard(listener.readable()).await.is_err());
        let client = TcpStream::connect(address).unwrap();
        listener.readable().await.unwrap();
        let accepted = listener.accept().unwrap().unwrap();
        assert_eq!(accepted.peer, client.local_addr().unwrap());
        assert!(TcpStream::from(accepted.fd).nodelay().unwrap());
        assert!(listener.accept().unwrap().is_none());
    });
}

#[test]
fn a_connect_tells_how_it_failed_and_binds_where_asked() {
    on_both(|| async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let options = ConnectOptions { bind: Some([127, 0, 0, 9].into()), mark: None };
        let socket = connect(address, options).await.unwrap();
        assert_eq!(socket.local_addr().unwrap().ip(), std::net::IpAddr::from([127, 0, 0, 9]));
        drop(listener);
        let refused = connect(address, ConnectOptions::default()).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn a_dropped_wait_loses_no_bytes() {
    on_both(|| async {
        let (mut near, far) = pair();
        let far = socket(far);
        for round in 0..100u8 {
            // The wait is under way when the bytes come, and is dropped.
            let watch = Watch::new();
            let waiting = Rc::new(watch);
            let stopper = waiting.stopper();
            spawn(async move { stopper(1) });
            let _ = waiting.guard(far.readable()).await;
            near.write_all(&[round]).unwrap();
            far.readable().await.unwrap();
            let mut byte = [0];
            assert_eq!((far.receive(&mut byte).unwrap(), byte[0]), (1, round));
        }
    });
}

#[test]
fn a_blocked_send_ends_when_its_session_is_stopped() {
    on_both(|| async {
        let (near, far) = pair();
        let near = socket(near);
        let watch = Rc::new(Watch::new());
        // Fill everything between the two.
        let mut total = 0;
        while let Ok(sent) = near.send_now(&[1; 65_536]) {
            total += sent;
        }
        let (stopper, done) = (watch.stopper(), Rc::new(Signal::default()));
        spawn({
            let (watch, done) = (watch.clone(), done.clone());
            async move {
                let mut buffer = Buffer::small();
                buffer.fill(1000);
                loop {
                    let (sent, back) = near.send(buffer, &watch).await;
                    buffer = back;
                    match sent {
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {
                            if watch.guard(near.writable()).await.is_err() {
                                break;
                            }
                        }
                        Ok(_) => panic!("there was no room"),
                        Err(_) => break,
                    }
                }
                done.set(());
            }
        });
        culvert_rt::sleep(Duration::from_millis(20)).await;
        assert_eq!(done.get(), None);
        stopper(1);
        done.wait().await;
        assert!(total > 0);
        drop(far);
    });
}

/// Waits for bytes with a buffer where the ring can, without one where it cannot.
async fn receive(socket: &Socket, watch: &Watch) -> Buffer {
    match socket.receive_held(watch).await {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        received => return received.unwrap(),
    }
    socket.readable().await.unwrap();
    let mut buffer = Buffer::small();
    let received = socket.receive(buffer.room()).unwrap();
    buffer.fill(received);
    buffer
}

/// Lets time pass on a thread of the test's own: what is tested begins after a second of silence.
#[allow(clippy::disallowed_methods)]
fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// RELIABILITY A5: bytes that come just when the buffer is given back are not lost.
#[test]
fn a_quiet_receive_gives_its_buffer_back_and_loses_nothing() {
    on_both(|| async {
        const SOCKETS: u8 = 200;
        spawn(Wheel::run());
        let (done, left) =
            (Rc::new(Signal::default()), Rc::new(std::cell::Cell::new(usize::from(SOCKETS))));
        let mut nears = Vec::new();
        for index in 0..SOCKETS {
            let (near, far) = pair();
            nears.push(near);
            let (far, done, left) = (socket(far), done.clone(), left.clone());
            spawn(async move {
                let watch = Watch::new();
                assert_eq!(receive(&far, &watch).await.filled(), [index]);
                assert_eq!(receive(&far, &watch).await.filled(), [index, index]);
                assert!(receive(&far, &watch).await.is_empty());
                left.set(left.get() - 1);
                if left.get() == 0 {
                    done.set(());
                }
            });
        }
        std::thread::spawn(move || {
            let at_once = nears.iter_mut().enumerate();
            at_once.for_each(|(index, near)| near.write_all(&[index as u8]).unwrap());
            // A second later all have fallen quiet, 16 in a turn of the wheel; meanwhile all speak.
            pause(1050);
            for (index, near) in nears.iter_mut().enumerate() {
                near.write_all(&[index as u8; 2]).unwrap();
                pause(3);
            }
        });
        done.wait().await;
        assert_eq!(culvert_rt::buffer_statistics().0, 0);
    });
}

#[test]
fn a_receive_that_waits_with_a_buffer_ends_when_its_session_is_stopped() {
    on(DriverChoice::IoUring, || async {
        let (mut near, far) = pair();
        let far = socket(far);
        let watch = Watch::new();
        let stopper = watch.stopper();
        spawn(async move { stopper(1) });
        let received = far.receive_held(&watch).await;
        assert!(received.is_ok_and(|buffer| buffer.is_empty()) && watch.halted().is_some());
        // Nothing was said to the peer yet: it is for the session to cut or to end.
        far.reset_on_close();
        drop(far);
        culvert_rt::sleep(Duration::from_millis(20)).await;
        assert_eq!(near.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
}

/// RELIABILITY A6: the kernel writes into no buffer that has been given to somebody else.
#[test]
fn a_task_that_is_aborted_leaves_its_buffer_to_the_kernel() {
    let until = std::env::var("SOAK").map_or(Duration::from_secs(1), |_| Duration::from_secs(60));
    on(DriverChoice::IoUring, move || async move {
        let begun = std::time::Instant::now();
        while begun.elapsed() < until {
            let pairs: Vec<_> = (0..16).map(|_| pair()).collect();
            let mut nears = Vec::new();
            for (index, (near, far)) in pairs.into_iter().enumerate() {
                nears.push(near);
                let far = socket(far);
                spawn(async move {
                    let watch = Watch::new();
                    let mut receive = std::pin::pin!(far.receive_held(&watch));
                    let mut polls = 0;
                    std::future::poll_fn(|cx| {
                        assert!(receive.as_mut().poll(cx).is_pending());
                        polls += 1;
                        if polls > index % 3 {
                            panic!("a test asked for it");
                        }
                        cx.waker().wake_by_ref();
                        std::task::Poll::<()>::Pending
                    })
                    .await;
                });
            }
            // Where the aborted tasks' buffers would be found if they had come back too early.
            culvert_rt::sleep(Duration::from_millis(1)).await;
            let mut canaries: Vec<_> = (0..64).map(|_| Buffer::small()).collect();
            canaries.iter_mut().for_each(|canary| canary.room().fill(0xca));
            for near in &mut nears {
                // It may be closed already.
                let _ = near.write_all(&[0x55; 4096]);
            }
            culvert_rt::sleep(Duration::from_millis(1)).await;
            let whole = canaries.iter_mut().all(|c| c.room().iter().all(|byte| *byte == 0xca));
            assert!(whole, "the kernel wrote into a buffer that was given away");
            for near in &mut nears {
                near.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let ended = near.read(&mut [0]);
                assert!(
                    matches!(&ended, Ok(0))
                        || ended.as_ref().is_err_and(|e| e.kind() != ErrorKind::WouldBlock),
                    "the socket of an aborted task stays open"
                );
            }
        }
    });
}

#[test]
fn a_panic_ends_its_task_only() {
    on_both(|| async {
        let before = culvert_rt::panics_total();
        let done = Rc::new(Signal::default());
        spawn(async { panic!("a test asked for it") });
        spawn({
            let done = done.clone();
            async move { done.set(()) }
        });
        done.wait().await;
        assert!(culvert_rt::panics_total() > before);
    });
}

#[test]
fn a_deadline_wakes_a_waiting_session() {
    on_both(|| async {
        spawn(Wheel::run());
        let (_near, far) = pair();
        let far = socket(far);
        let watch = Watch::new();
        watch.stage(Duration::from_millis(100), 9);
        assert_eq!(watch.guard(far.readable()).await.unwrap_err().0, 9);
    });
}

#[test]
fn messages_of_other_threads_arrive() {
    on_both(|| async {
        let (sender, mailbox) = mailbox(64).unwrap();
        let inbox = mailbox.open().unwrap();
        std::thread::spawn(move || {
            for i in 0..10_000u32 {
                let mut message = i;
                while let Err(culvert_rt::Full(back)) = sender.send(message) {
                    message = back;
                    std::thread::yield_now();
                }
            }
        });
        for i in 0..10_000u32 {
            assert_eq!(inbox.receive().await, i);
        }
    });
}

/// RELIABILITY B6: 4,000 sockets readable at once on a ring of 256.
#[test]
fn more_completions_than_the_ring_holds_stall_nobody() {
    on_both(|| async {
        let mut pairs: Vec<(UnixStream, Rc<Socket>)> = (0..4000)
            .map(|_| {
                let (near, far) = UnixStream::pair().unwrap();
                far.set_nonblocking(true).unwrap();
                (near, Rc::new(Socket::from_fd(OwnedFd::from(far)).unwrap()))
            })
            .collect();
        let left = Rc::new(std::cell::Cell::new(pairs.len()));
        let done = Rc::new(Signal::default());
        for (_, socket) in &pairs {
            let (socket, left, done) = (socket.clone(), left.clone(), done.clone());
            spawn(async move {
                socket.readable().await.unwrap();
                assert_eq!(socket.receive(&mut [0; 8]).unwrap(), 1);
                left.set(left.get() - 1);
                if left.get() == 0 {
                    done.set(());
                }
            });
        }
        // All wait; then all are ready before the worker looks again.
        culvert_rt::sleep(Duration::from_millis(50)).await;
        for (near, _) in &mut pairs {
            near.write_all(&[1]).unwrap();
        }
        done.wait().await;
    });
}

/// RELIABILITY B7: 10,000 operations in one turn of the worker on a ring of 256.
#[test]
fn a_full_submission_queue_is_flushed() {
    on(DriverChoice::IoUring, || async {
        let (mut near, far) = pair();
        let far = Rc::new(socket(far));
        let left = Rc::new(std::cell::Cell::new(10_000));
        let done = Rc::new(Signal::default());
        near.write_all(&[1]).unwrap();
        for _ in 0..10_000 {
            let (far, left, done) = (far.clone(), left.clone(), done.clone());
            spawn(async move {
                far.writable().await.unwrap();
                left.set(left.get() - 1);
                if left.get() == 0 {
                    done.set(());
                }
            });
        }
        done.wait().await;
    });
}

#[test]
fn a_reset_is_a_reset_and_an_end_an_end() {
    on_both(|| async {
        let (mut near, far) = pair();
        let far = socket(far);
        far.shutdown_write().unwrap();
        assert_eq!(near.read(&mut [0]).unwrap(), 0);
        let (mut near, far) = pair();
        let far = socket(far);
        far.reset_on_close();
        drop(far);
        culvert_rt::sleep(Duration::from_millis(20)).await;
        assert_eq!(near.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
}
