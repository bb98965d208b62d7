//! The ttRPC server: requests in, one call each into the module that does the work.
//!
//! Every request runs in a task of its own on the runtime. What changes state is spawned once more
//! (`detached`): the server drops a handler when its connection goes or its deadline passes, and a
//! half-made container must not be the result. Blocking system calls go to blocking threads.
//! Requests without a method here are answered UNIMPLEMENTED by the generated trait.

mod health;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protocols::agent::{
    AddARPNeighborsRequest, CloseStdinRequest, CopyFileRequest, CreateContainerRequest,
    CreateSandboxRequest, DestroySandboxRequest, ExecProcessRequest, GetMetricsRequest,
    GetOOMEventRequest, GuestDetailsRequest, GuestDetailsResponse, Interfaces,
    ListInterfacesRequest, ListRoutesRequest, MemHotplugByProbeRequest, Metrics, OOMEvent,
    OnlineCPUMemRequest, PauseContainerRequest, ReadStreamRequest, ReadStreamResponse,
    RemoveContainerRequest, ReseedRandomDevRequest, ResumeContainerRequest, Routes,
    SetGuestDateTimeRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, VolumeStatsRequest, WaitProcessRequest, WaitProcessResponse,
    WriteStreamRequest, WriteStreamResponse,
};
use protocols::agent_ttrpc::{AgentService, create_agent_service};
use protocols::agent_types::Interface;
use protocols::csi::VolumeStatsResponse;
use protocols::empty::Empty;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::container;
use crate::copy_file;
use crate::error::{AgentError, IoContext, Result};
use crate::guest;
use crate::log;
use crate::network;
use crate::sandbox::Sandbox;
use crate::spec;
use crate::stats;

type Reply<T> = ttrpc::Result<T>;
type Context = TtrpcContext;

/// The reply to `DestroySandbox` leaves before the guest ends.
const FAREWELL: Duration = Duration::from_millis(100);

struct Agent {
    sandbox: Arc<Sandbox>,
    destroyed: Arc<Notify>,
}

/// Serves until the sandbox is destroyed or the process is told to end.
///
/// # Errors
/// The address cannot be listened on.
pub(crate) async fn serve(sandbox: Arc<Sandbox>) -> Result<()> {
    let destroyed = Arc::new(Notify::new());
    let address = sandbox.config.server_address.clone();
    let agent = Arc::new(Agent {
        sandbox,
        destroyed: Arc::clone(&destroyed),
    });
    let failed = |error: ttrpc::Error| AgentError::Runtime(format!("serve {address}: {error}"));
    let mut server = Server::new()
        .bind(&address)
        .map_err(failed)?
        .register_service(create_agent_service(agent))
        .register_service(health::service());
    server.start().await.map_err(failed)?;
    log::info("server", format!("listening on {address}"));
    let mut terminated = signal(SignalKind::terminate()).during("catch SIGTERM")?;
    tokio::select! {
        () = destroyed.notified() => tokio::time::sleep(FAREWELL).await,
        _ = terminated.recv() => {}
    }
    Ok(())
}

/// Runs to the end even if the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Reply<T> {
    let result = tokio::spawn(work).await.map_err(|_| AgentError::TaskLost);
    Ok(result.and_then(|result| result)?)
}

/// Runs on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Reply<T> {
    let result = tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| AgentError::TaskLost);
    Ok(result.and_then(|result| result)?)
}

impl Agent {
    async fn read(&self, request: ReadStreamRequest, is_stderr: bool) -> Reply<ReadStreamResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        let output = if is_stderr {
            process.stdio.stderr.as_ref()
        } else {
            Some(&process.stdio.stdout)
        };
        let mut response = ReadStreamResponse::new();
        // A terminal has one stream; the other is at its end from the start.
        if let Some(output) = output {
            response.data = output.read(request.len).await?;
        }
        process.note_read();
        if response.data.is_empty() {
            container.release_exec(&request.exec_id, &process);
        }
        Ok(response)
    }

    async fn write(&self, container_id: &str, exec_id: &str, data: &[u8]) -> Reply<()> {
        let container = self.sandbox.container(container_id)?;
        let process = container.process(exec_id)?;
        Ok(process.stdio.write_stdin(data, process.exit()).await?)
    }

    async fn pause(&self, container_id: &str, is_pause: bool) -> Reply<Empty> {
        let container = self.sandbox.container(container_id)?;
        detached(async move { container.pause(is_pause).await }).await?;
        Ok(Empty::new())
    }
}

#[async_trait]
impl AgentService for Agent {
    async fn create_container(&self, _: &Context, request: CreateContainerRequest) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move { container::create(&sandbox, request).await }).await?;
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &Context, request: StartContainerRequest) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        detached(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &Context, request: RemoveContainerRequest) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move { sandbox.remove(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &Context, request: ExecProcessRequest) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move {
            let process = request
                .process
                .as_ref()
                .ok_or_else(|| AgentError::invalid("request", "process is missing"))?;
            container.exec(&sandbox, &request.exec_id, process).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &Context, request: SignalProcessRequest) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        container.signal(&request.exec_id, request.signal)?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &Context,
        request: WaitProcessRequest,
    ) -> Reply<WaitProcessResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.wait().await;
        container.keep_output(&request.exec_id, &process);
        let mut response = WaitProcessResponse::new();
        response.status = exit.status;
        Ok(response)
    }

    async fn update_container(&self, _: &Context, request: UpdateContainerRequest) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        if let Some(resources) = request.resources.as_ref() {
            let resources = spec::resources(resources)?;
            blocking(move || container.cgroup.update(&resources)).await?;
        }
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _: &Context,
        request: StatsContainerRequest,
    ) -> Reply<StatsContainerResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        blocking(move || stats::read(&container.cgroup)).await
    }

    async fn pause_container(&self, _: &Context, request: PauseContainerRequest) -> Reply<Empty> {
        self.pause(&request.container_id, true).await
    }

    async fn resume_container(&self, _: &Context, request: ResumeContainerRequest) -> Reply<Empty> {
        self.pause(&request.container_id, false).await
    }

    async fn write_stdin(
        &self,
        _: &Context,
        request: WriteStreamRequest,
    ) -> Reply<WriteStreamResponse> {
        self.write(&request.container_id, &request.exec_id, &request.data)
            .await?;
        let mut response = WriteStreamResponse::new();
        response.len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
        Ok(response)
    }

    async fn close_stdin(&self, _: &Context, request: CloseStdinRequest) -> Reply<Empty> {
        self.write(&request.container_id, &request.exec_id, &[])
            .await?;
        Ok(Empty::new())
    }

    async fn read_stdout(
        &self,
        _: &Context,
        request: ReadStreamRequest,
    ) -> Reply<ReadStreamResponse> {
        self.read(request, false).await
    }

    async fn read_stderr(
        &self,
        _: &Context,
        request: ReadStreamRequest,
    ) -> Reply<ReadStreamResponse> {
        self.read(request, true).await
    }

    async fn tty_win_resize(&self, _: &Context, request: TtyWinResizeRequest) -> Reply<Empty> {
        let container = self.sandbox.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        process.stdio.resize(request.row, request.column)?;
        Ok(Empty::new())
    }

    async fn update_interface(
        &self,
        _: &Context,
        request: UpdateInterfaceRequest,
    ) -> Reply<Interface> {
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move { network::update_interface(request, &sandbox.devices).await }).await
    }

    async fn update_routes(&self, _: &Context, request: UpdateRoutesRequest) -> Reply<Routes> {
        detached(network::update_routes(request)).await
    }

    async fn list_interfaces(&self, _: &Context, _: ListInterfacesRequest) -> Reply<Interfaces> {
        Ok(network::list_interfaces().await?)
    }

    async fn list_routes(&self, _: &Context, _: ListRoutesRequest) -> Reply<Routes> {
        Ok(network::list_routes().await?)
    }

    async fn add_arp_neighbors(
        &self,
        _: &Context,
        request: AddARPNeighborsRequest,
    ) -> Reply<Empty> {
        detached(network::add_neighbors(request)).await?;
        Ok(Empty::new())
    }

    async fn get_metrics(&self, _: &Context, _: GetMetricsRequest) -> Reply<Metrics> {
        let mut response = Metrics::new();
        response.metrics = blocking(|| Ok(guest::metrics())).await?;
        Ok(response)
    }

    async fn create_sandbox(&self, _: &Context, request: CreateSandboxRequest) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move { sandbox.create(request).await }).await?;
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &Context, _: DestroySandboxRequest) -> Reply<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        let destroyed = Arc::clone(&self.destroyed);
        detached(async move {
            sandbox.destroy().await;
            destroyed.notify_one();
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn online_cpu_mem(&self, _: &Context, request: OnlineCPUMemRequest) -> Reply<Empty> {
        detached(async move { guest::online(&request).await }).await?;
        Ok(Empty::new())
    }

    async fn reseed_random_dev(
        &self,
        _: &Context,
        request: ReseedRandomDevRequest,
    ) -> Reply<Empty> {
        blocking(move || guest::reseed(&request.data)).await?;
        Ok(Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &Context,
        request: GuestDetailsRequest,
    ) -> Reply<GuestDetailsResponse> {
        Ok(guest::details(&request)?)
    }

    async fn mem_hotplug_by_probe(
        &self,
        _: &Context,
        request: MemHotplugByProbeRequest,
    ) -> Reply<Empty> {
        blocking(move || guest::probe_memory(&request.memHotplugProbeAddr)).await?;
        Ok(Empty::new())
    }

    async fn set_guest_date_time(
        &self,
        _: &Context,
        request: SetGuestDateTimeRequest,
    ) -> Reply<Empty> {
        guest::set_time(&request)?;
        Ok(Empty::new())
    }

    async fn copy_file(&self, _: &Context, request: CopyFileRequest) -> Reply<Empty> {
        blocking(move || copy_file::copy(&request)).await?;
        Ok(Empty::new())
    }

    async fn get_oom_event(&self, _: &Context, _: GetOOMEventRequest) -> Reply<OOMEvent> {
        let mut response = OOMEvent::new();
        response.container_id = self.sandbox.oom.next().await;
        Ok(response)
    }

    async fn get_volume_stats(
        &self,
        _: &Context,
        request: VolumeStatsRequest,
    ) -> Reply<VolumeStatsResponse> {
        blocking(move || guest::volume_stats(&request.volume_guest_path)).await
    }
}
