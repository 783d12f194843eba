// Surfaces of lungs and infection, to be turned by hand: what viewer.js loads when someone asks for it.
import "@kitware/vtk.js/Rendering/Profiles/Geometry";
import vtkGLTFImporter from "@kitware/vtk.js/IO/Geometry/GLTFImporter";
import vtkGenericRenderWindow from "@kitware/vtk.js/Rendering/Misc/GenericRenderWindow";

const GROUND = [0.043, 0.055, 0.07];
const STEP = 10;  // degrees a key

/** Draw the glTF-binary bytes into an element; gives what ends the view. The front of the patient is seen first. */
export async function show(container, bytes) {
  const view = vtkGenericRenderWindow.newInstance({background: GROUND, listenWindowResize: false});
  view.setContainer(container);
  const renderer = view.getRenderer(), camera = renderer.getActiveCamera();
  const hasRoom = () => container.clientWidth && container.clientHeight;
  const draw = () => hasRoom() && view.getRenderWindow().render(), fit = () => hasRoom() && view.resize();
  const importer = vtkGLTFImporter.newInstance({renderer});
  await new Promise((ready, failed) => {
    importer.onReady(ready);
    importer.parseAsBinary(bytes).catch(failed);
  });
  importer.importActors();
  for (const actor of renderer.getActors()) {
    const look = actor.getProperty();
    look.setInterpolationToPhong();  // image-based light, which glTF's materials ask for, needs an environment
    look.set({ambient: 0.25, diffuse: 0.75, specular: 0.15, specularPower: 20});
  }
  const reset = () => {
    camera.set({position: [0, 0, 1], focalPoint: [0, 0, 0], viewUp: [0, 1, 0]});
    renderer.resetCamera();
    camera.zoom(1.3);
    renderer.resetCameraClippingRange();
    draw();
  };
  const keys = {ArrowLeft: () => camera.azimuth(STEP), ArrowRight: () => camera.azimuth(-STEP), ArrowUp: () => camera.elevation(-STEP), ArrowDown: () => camera.elevation(STEP), Home: reset};
  const turn = event => {
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
    camera.orthogonalizeViewUp();
    renderer.resetCameraClippingRange();
    draw();
  };
  container.addEventListener("keydown", turn);
  const resized = new ResizeObserver(() => {
    fit();
    draw();
  });
  resized.observe(container);
  fit();
  reset();
  return () => {
    resized.disconnect();
    container.removeEventListener("keydown", turn);
    view.delete();
  };
}
